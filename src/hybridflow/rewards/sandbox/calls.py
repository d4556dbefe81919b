"""What runs inside the jail around a program, and how values travel between jails: plain data as JSON.

Everything here that shares a process with the program may be rewritten by it, so nothing here is trusted: `run` and
`serve` hold no expected value. `check` runs the tests of a row in a jail of its own; there the program's functions are
stand-ins that send arguments to the program's jail and get plain data back. Standard library only.
"""

from __future__ import annotations

import builtins
import os
import sys

TYPE_CHECKING = False  # typing itself takes longer to import than most programs run
if TYPE_CHECKING:
    from typing import Any

_PLAIN = (type(None), bool, int, str)
_TAGS = {"tuple": tuple, "set": set, "frozenset": frozenset}

# Solutions written for a judge that has imported these already, as LeetCode has: what is used is imported.
_MODULES = (
    "bisect collections copy datetime functools heapq itertools json math operator random re string sys time typing"
)
_IMPORTED = {
    "bisect": "bisect bisect_left bisect_right insort insort_left insort_right",
    "collections": "ChainMap Counter OrderedDict defaultdict deque namedtuple",
    "functools": "cache cmp_to_key lru_cache partial reduce",
    "heapq": "heapify heappop heappush heappushpop heapreplace merge nlargest nsmallest",
    "itertools": "accumulate chain combinations combinations_with_replacement cycle groupby islice pairwise "
    "permutations product repeat zip_longest",
    "math": "ceil comb factorial floor gcd inf isqrt lcm log log2 perm pi sqrt",
    "typing": "Any Callable DefaultDict Deque Dict FrozenSet Generator Iterable Iterator List Optional Sequence Set "
    "Tuple Union",
}


def encode(value: Any, depth: int = 0) -> Any:
    """Plain data as what JSON can hold. The types are compared exactly: a subclass could be anything.

    >>> encode((1, [2.5, "x"], {3: None}))
    {'tuple': [1, [{'float': '2.5'}, 'x'], {'dict': [[3, None]]}]}

    Raises:
        TypeError: a value that is not plain data.
    """
    kind = type(value)
    if depth > 200:
        raise TypeError("nested too deeply")
    if kind in _PLAIN:
        return value
    if kind is float:
        return {"float": repr(value)}
    if kind is complex:
        return {"complex": repr(value)}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is list:
        return [encode(v, depth + 1) for v in value]
    if kind is dict:
        return {"dict": [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]}
    for tag, known in _TAGS.items():
        if kind is known:
            return {tag: [encode(v, depth + 1) for v in value]}
    raise TypeError(f"{kind.__name__} is not plain data")


def decode(value: Any) -> Any:
    """The value that `encode` was given.

    >>> decode(encode([(1, 2), {3}, {"a": float("inf")}, b"x"]))
    [(1, 2), {3}, {'a': inf}, b'x']

    Raises:
        ValueError: not what `encode` writes.
        TypeError: a set or a dict of what cannot be hashed.
    """
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError("not an encoded value")
    tag, held = next(iter(value.items()))
    if tag == "float":
        return float(held)
    if tag == "complex":
        return complex(held)
    if tag == "bytes":
        return bytes.fromhex(held)
    if tag == "dict":
        return {decode(k): decode(v) for k, v in held}
    if tag in _TAGS:
        return _TAGS[tag](decode(v) for v in held)
    raise ValueError(f"not an encoded value: {str(tag)[:40]}")


# --- in the jail of the program ---


def run(program: str) -> None:
    """The program as `python program.py` would run it."""
    space = _module("__main__")
    exec(compile(program, "program.py", "exec"), space)


def serve(program: str, requests: int, replies: int) -> None:
    """Loads the program, then calls what the other side names: one JSON line in, one out."""
    space = _load(program)
    objects: list[Any] = []  # results that are not plain data stay here, and are called by their number
    with open(requests, encoding="utf-8") as lines, open(replies, "w", encoding="utf-8") as out:
        for line in lines:
            out.write(_answer(space, objects, line) + "\n")
            out.flush()


def answer(program: str, request: str) -> str:
    """Loads the program, and calls it once."""
    return _answer(_load(program), [], request)


def _load(program: str) -> dict[str, Any]:
    space = _module("solution")
    code = compile(program, "program.py", "exec")
    _import_used(code, space)
    exec(code, space)
    return space


def _answer(space: dict[str, Any], objects: list[Any], line: str) -> str:
    import json

    request = json.loads(line)
    try:
        target = _target(space, objects, request)
        result = target(*decode(request["args"]), **decode(request["kwargs"]))
        try:
            return json.dumps({"value": encode(result)})
        except TypeError:
            objects.append(result)
            return json.dumps({"object": len(objects) - 1})
    except Exception as error:
        return json.dumps({"raised": type(error).__name__, "text": str(error)[:500]})


def _target(space: dict[str, Any], objects: list[Any], request: Any) -> Any:
    if request["object"] is not None:
        return getattr(objects[request["object"]], request["name"])
    if request["name"] not in space and "Solution" in space:
        return getattr(space["Solution"](), request["name"])
    return space[request["name"]]


def _import_used(code: Any, space: dict[str, Any]) -> None:
    codes, names = [code], set()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [c for c in code.co_consts if type(c) is type(code)]
    for module in _MODULES.split():
        wanted = names & set(_IMPORTED.get(module, "").split())
        if wanted or module in names:
            loaded = __import__(module)
            space.update({name: getattr(loaded, name) for name in wanted})
            space.setdefault(module, loaded)


def _module(name: str) -> dict[str, Any]:
    module = type(sys)(name)
    sys.modules[name] = module
    return module.__dict__


# --- in the jail of the tests ---


class StandIn:
    """A function, a class or an object of the program, which is in another jail."""

    def __init__(self, link: Any, name: str, number: int | None = None) -> None:
        self._link, self._name, self._number = link, name, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Has the program call it.

        Raises:
            Exception: of the built-in kind that the program raised.
        """
        return self._link({"object": self._number, "name": self._name, "args": encode(list(args))}, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self._number is None:
            raise AttributeError(name)
        return StandIn(self._link, name, self._number)

    def _refuse(self, *_: Any) -> Any:
        raise TypeError("what the program returned is not plain data, so it is neither true nor equal to anything")

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __len__ = __iter__ = __contains__ = _refuse
    __hash__ = object.__hash__


def check(test: str, requests: int, replies: int, verdict: int) -> None:
    """Runs a test; writes `passed` to the descriptor `verdict` if it goes through to its end."""
    import ast
    import json

    tree = ast.parse(test)
    lines = open(replies, encoding="utf-8")  # noqa: SIM115  (both are open until the process ends)
    out = open(requests, "w", encoding="utf-8")  # noqa: SIM115

    def link(request: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        sent = json.dumps(request | {"kwargs": encode(kwargs)}) + "\n"
        try:
            out.write(sent)
            out.flush()
            line = lines.readline()
        except OSError:
            line = ""
        if not line:  # the program has ended; an exception could be one that the test is glad to catch
            os._exit(1)
        reply = json.loads(line)
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), None)
            if not isinstance(kind, type) or not issubclass(kind, Exception):
                kind = RuntimeError
            raise kind(str(reply.get("text")))
        if "object" in reply:
            return StandIn(link, "", int(reply["object"]))
        return decode(reply["value"])

    space = _module("__main__")
    code = compile(tree, "test.py", "exec")
    _import_used(code, space)
    imports = ast.Import | ast.ImportFrom
    bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    bound |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    bound |= {a.asname or a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, imports) for a in n.names}
    named = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    for name in named:
        if name not in bound and name not in space and not hasattr(builtins, name):
            space[name] = StandIn(link, name)
    exec(code, space)
    os.write(verdict, b"passed")
