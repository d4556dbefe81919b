"""What runs inside the jail around a program.

Everything here shares a process with the program, which may rewrite it. So nothing here is trusted, and nothing here
holds an expected value: this file calls the program's functions, and reports the results. Tests run in a jail of their
own (`standins.py`). Standard library only.

**Names.** The dictionary of the program's module holds only what the program has defined: names that it may use without
an import are among the built-ins of the module.
"""

from __future__ import annotations

import builtins
import sys

TYPE_CHECKING = False  # typing itself takes longer to import than most programs run
if TYPE_CHECKING:
    from typing import Any

if __name__ != "driver":  # in a jail it has been executed before, in this very namespace
    from hybridflow.rewards.sandbox.values import KNOWN, ValueCodec, base_of, base_value, known_name

# Solutions written for a judge that has imported these already, as LeetCode, APPS and LiveCodeBench have.
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

# What Python asks of a type rather than of an object: a stand-in has those that the program's class has.
SYMBOLS = {
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "add": "+", "sub": "-", "mul": "*",
    "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**", "matmul": "@", "and": "&", "or": "|", "xor": "^",
    "lshift": "<<", "rshift": ">>",
}  # fmt: skip
_ASKED: dict[str, Any] = {
    "bool": bool, "len": len, "iter": iter, "next": next, "str": str, "repr": repr, "hash": hash, "int": int,
    "float": float, "complex": complex, "reversed": reversed, "format": format, "round": round, "abs": abs,
}  # fmt: skip
_OTHERS = "index neg pos invert call contains getitem setitem delitem enter exit trunc floor ceil"
SPECIAL = [f"__{name}__" for name in (*SYMBOLS, *_ASKED, *_OTHERS.split())]


def run(program: str) -> None:
    """Runs the program as `python program.py` would."""
    exec(compile(program, "program.py", "exec"), _module("__main__"))


def serve(program: str, requests: int, replies: int, judge: bool) -> None:
    """Loads the program, then serves requests of the other side: one JSON line in, one out.

    Args:
        program: its text.
        requests: a descriptor to read from.
        replies: one to write to.
        judge: whether one function is called as judges do it; else a test asks for names, and printed text goes to the
            test.
    """
    import json  # before the program, which may have a module of that name

    with open(requests, encoding="utf-8") as lines, open(replies, "w", encoding="utf-8") as out:
        printed = None if judge else _Printed()
        if printed is not None:
            sys.stdout = printed
            out.write("{}\n")  # the walls stand
            out.flush()
        served = Served(_load(program, judge), printed)

        def back(request: dict[str, Any]) -> Any:
            """Makes the test call a function of its own, which may call the program."""
            out.write(json.dumps(request) + "\n")
            out.flush()
            while True:
                reply = json.loads(next(lines))
                if "op" not in reply:
                    return reply
                out.write(json.dumps(served.answer(reply)) + "\n")
                out.flush()

        served.back = back
        for line in lines:
            out.write(json.dumps(served.answer(json.loads(line))) + "\n")
            out.flush()


def answer(program: str, request: str) -> str:
    """Loads the program, and calls it once, as judges do."""
    import json

    return json.dumps(Served(_load(program, True), None).answer(json.loads(request)))


def function_call(name: str, arguments: list[Any]) -> dict[str, Any]:
    """Returns the request to call a function in the way that judges do."""
    wire = ValueCodec(shared=False)
    kwargs: dict[str, Any] = {}
    return {"op": "function", "name": name, "args": wire.encode(arguments), "kwargs": wire.encode(kwargs)}


def _load(program: str, judge: bool) -> dict[str, Any]:
    space = _module("solution")
    code = compile(program, "program.py", "exec")
    given = imported(code, _MODULES.split() if judge else ["typing"])
    if given:
        space["__builtins__"] = {**builtins.__dict__, **given}
    exec(code, space)
    return space


def imported(code: Any, modules: list[str]) -> dict[str, Any]:
    """Returns those of these modules, and of their names in `_IMPORTED`, that the code names."""
    codes, names = [code], set()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [c for c in code.co_consts if type(c) is type(code)]
    given: dict[str, Any] = {}
    for module in modules:
        wanted = names & set(_IMPORTED.get(module, "").split())
        if wanted or module in names:
            loaded = __import__(module)
            given.update({name: getattr(loaded, name) for name in wanted})
            given.setdefault(module, loaded)
    return given


def _module(name: str) -> dict[str, Any]:
    vars(builtins).update(
        exit=sys.exit, quit=sys.exit
    )  # as `site` gives them to every program, and is not imported here
    module = type(sys)(name)
    sys.modules[name] = module
    return module.__dict__


class _Printed:
    """The text that the program prints, for the test that has called it. At most a megabyte between two calls."""

    encoding, errors = "utf-8", "strict"

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.left = 1 << 20

    def write(self, text: str) -> int:
        """Writes text, as a file does."""
        self.parts.append(text[: self.left])
        self.left -= len(self.parts[-1])
        return len(text)

    def flush(self) -> None:
        """Flushes, as a file does."""

    def isatty(self) -> bool:
        """Returns whether it is a terminal, as a file does."""
        return False

    def take(self) -> str:
        """Returns the text printed since the last call."""
        text, self.parts, self.left = "".join(self.parts), [], 1 << 20
        return text


class Theirs:
    """A function, or an iterator, of the test's, which is in another jail."""

    def __init__(self, served: Served, number: int) -> None:
        self._served, self._number = served, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the test call it.

        Raises:
            Exception: of the built-in kind that it raised.
        """
        return self._served.ask_back("call", self._number, args, kwargs)


class TheirIterator(Theirs):
    """An iterator of the test's."""

    def __iter__(self) -> TheirIterator:
        return self

    def __next__(self) -> Any:
        return self._served.ask_back("next", self._number, (), {})


class Served:
    """A loaded program: serves requests, and keeps objects that are no plain data, by their number.

    Args:
        space: the program's names.
        printed: takes the text that it prints; None: its output does.
    """

    def __init__(self, space: dict[str, Any], printed: _Printed | None) -> None:
        self.space, self.printed = space, printed
        self.back: Any = None
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._told: set[int] = set()
        if printed is not None:
            printed.take()

    def answer(self, request: Any) -> Any:
        """Returns the reply to a request."""
        wire = ValueCodec(self._refer, self._resolve, shared=request["op"] != "function")
        try:
            args, kwargs = wire.decode(request["args"]), wire.decode(request["kwargs"])
            before = wire.contents() if wire.shared else []
            reply = self._do(request, wire, args, kwargs)
            changed = wire.changes(before)
            if changed:
                reply["changed"] = changed
        except Exception as error:
            reply = self._raised(error)
        if self.printed is not None and self.printed.parts:
            reply["printed"] = self.printed.take()
        return reply

    def _do(self, request: Any, wire: ValueCodec, args: Any, kwargs: Any) -> dict[str, Any]:
        op, name = request["op"], request["name"]
        if op == "function":
            return {"value": wire.encode(_function(self.space, name)(*args, **kwargs))}
        if op == "names":
            return {"value": [name for name in self.space if type(name) is str and not name.startswith("__")]}
        if op == "name":
            return {"value": wire.encode(self.space[name])} if name in self.space else {"missing": True}
        target = self._objects[request["object"]]
        if op == "base":
            base = base_of(type(target))
            if base is None:
                return {"missing": True}
            value = base_value(target) if base in (int, str) else base(target)
            return {"value": wire.encode(value)}
        if op == "call":
            return {"value": wire.encode(target(*args, **kwargs))}
        if op == "get":
            return {"value": wire.encode(getattr(target, name))}
        if op == "set":
            setattr(target, name, *args)
            return {"value": None}
        if op == "delete":
            delattr(target, name)
            return {"value": None}
        plain = name.strip("_")
        if op == "reflected":
            return {"value": wire.encode(eval(f"b {SYMBOLS[plain]} a", {"a": target, "b": args[0]}))}
        if plain in SYMBOLS:
            return {"value": wire.encode(eval(f"a {SYMBOLS[plain]} b", {"a": target, "b": args[0]}))}
        if plain in _ASKED:
            return {"value": wire.encode(_ASKED[plain](target, *args))}
        return {"value": wire.encode(getattr(type(target), name)(target, *args, **kwargs))}

    def ask_back(self, op: str, number: int, args: Any, kwargs: Any) -> Any:
        """Makes the test use an object that it gave."""
        wire = ValueCodec(self._refer, self._resolve)
        sent = {"back": op, "theirs": number, "args": wire.encode(args), "kwargs": wire.encode(kwargs)}
        reply = self.back(sent)
        wire.change(reply.get("changed", ()))
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), RuntimeError)
            raise kind(*wire.decode(reply["args"]))
        return wire.decode(reply["value"])

    def _raised(self, error: BaseException) -> dict[str, Any]:
        wire = ValueCodec(self._refer, self._resolve)
        reply: dict[str, Any] = {"raised": self._refer_class(type(error)), "number": self._number(error)}
        try:
            reply["args"] = wire.encode(error.args)
        except Exception:
            reply["args"] = {"tuple": []}
        return reply

    def _number(self, value: Any) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return self._numbers[id(value)]

    def _refer(self, value: Any) -> Any:
        if isinstance(value, Theirs):
            return {"theirs": value._number}
        if isinstance(value, type):
            return self._refer_class(value)
        if isinstance(value, type(sys)) and value.__name__ in KNOWN:
            return {"module": value.__name__}
        return {"object": self._number(value), "class": self._tell_class(type(value))}

    def _refer_class(self, kind: type) -> Any:
        known = known_name(kind)
        return self._tell_class(kind) if known is None else {"known": known}

    def _tell_class(self, kind: type) -> dict[str, Any]:
        """Returns what the test's side needs to know of a class, the first time; then its number."""
        known = known_name(kind)
        wire: dict[str, Any] = {"class": self._number(kind)}
        if wire["class"] not in self._told:
            self._told.add(wire["class"])
            wire["name"] = kind.__name__
            wire["bases"] = [self._refer_class(base) for base in kind.__bases__]
            wire["special"] = [
                name for name in SPECIAL if getattr(kind, name, None) not in (None, getattr(object, name, None))
            ]
            base = base_of(kind)
            wire["base"] = None if base is None else base.__name__
            if known is not None:
                wire["known"] = known
        return wire

    def _resolve(self, wire: dict[str, Any]) -> Any:
        if "mine" in wire:
            return self._objects[wire["mine"]]
        if "theirs" in wire:
            return (TheirIterator if wire["iterator"] else Theirs)(self, wire["theirs"])
        return __import__(wire["module"])


def _function(space: dict[str, Any], name: str) -> Any:
    """Returns the function that a judge calls: of the program, or of its class ``Solution``."""
    if name not in space and "Solution" in space:
        return getattr(space["Solution"](), name)
    return space[name]
