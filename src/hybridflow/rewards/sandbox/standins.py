"""What runs inside the jail of a test: the test, and stand-ins for the program, which is in another jail.

**Names.** A name that the test does not define is the program's if the program defines it, else a built-in, else
nothing. If the program redefines a built-in, and the test calls other functions of the program too, the test must also
pass with the real built-in: a redefined one may be tested, but must not decide (`def abs(x): return 0`).

**Stand-ins.** Plain data arrives as plain data; an object of the program's is one of a class made here, which asks the
program for everything except comparisons with a value of the test's own. In these only its plain data counts, if its
class is derived from a type of plain data (a namedtuple, an int of an Enum); else it is unequal, and has no order and
no sum. So no `__eq__` of a program decides against a value that a test expects. Standard library only.
"""

from __future__ import annotations

import builtins
import os
import sys

TYPE_CHECKING = False  # typing itself takes longer to import than most programs run
if TYPE_CHECKING:
    from typing import Any

if __name__ != "driver":  # in a jail they have been executed before, in this very namespace
    from hybridflow.rewards.sandbox.calls import SPECIAL, SYMBOLS, _module
    from hybridflow.rewards.sandbox.values import KNOWN, ValueCodec, known_value

_TRAPS = (AssertionError, Exception, BaseException)  # a handler of these catches the failure of a test
_MISSING = object()
# By the id of a stand-in: its link and its number. Kept beside them, as all of their own names are the program's.
_HELD: dict[int, tuple[Link, int]] = {}


class StandIn:
    """An object of the program's. Classes made from it have the special methods that the program's class has."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        return _attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "set", name, value)

    def __delattr__(self, name: str) -> None:
        _ask(self, "delete", name)

    def __str__(self) -> str:
        return str(_ask(self, "special", "__str__"))

    def __repr__(self) -> str:
        return str(_ask(self, "special", "__repr__"))

    def __hash__(self) -> int:
        return int(_ask(self, "special", "__hash__"))

    def __copy__(self) -> Any:
        raise TypeError("an object of the program's cannot be copied by a test")

    def __deepcopy__(self, _: Any) -> Any:
        raise TypeError("an object of the program's cannot be copied by a test")


class StandInClass(type):
    """The type of the stand-ins for the program's classes."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes an object of the class: in the program, unless a test makes it from an exception of the program."""
        if issubclass(cls, BaseException) and id(cls) not in _HELD:
            return super().__call__(*args, **kwargs)
        return _ask(cls, "call", "", *args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return _attribute(cls, name)

    def __setattr__(cls, name: str, value: Any) -> None:
        _ask(cls, "set", name, value)

    def __iter__(cls) -> Any:
        return _ask(cls, "special", "__iter__")

    def __len__(cls) -> int:
        return int(_ask(cls, "special", "__len__"))

    def __bool__(cls) -> bool:
        return True

    def __getitem__(cls, key: Any) -> Any:
        return _ask(cls, "special", "__getitem__", key)

    def __contains__(cls, value: Any) -> bool:
        return bool(_ask(cls, "special", "__contains__", value))


def _ask(target: Any, op: str, name: str, *args: Any, **kwargs: Any) -> Any:
    if id(target) not in _HELD:
        raise TypeError("a test cannot extend a class of the program's")
    link, number = _HELD[id(target)]
    return link.ask(op, name, number, args, kwargs)


def _stands_in(value: Any) -> bool:
    return isinstance(value, StandIn | StandInClass)


def _operator(name: str, reflected: bool) -> Any:
    symbol = SYMBOLS[name]
    compute = eval(f"lambda a, b: b {symbol} a" if reflected else f"lambda a, b: a {symbol} b")

    def operate(self: Any, other: Any) -> Any:
        if _stands_in(other):  # both are the program's
            return _ask(self, "reflected" if reflected else "special", f"__{name}__", other)
        link, number = _HELD[id(self)]
        base = link.base(number)
        if base is not _MISSING:
            return compute(base, other)
        if name not in ("eq", "ne") or "__eq__" in link.told[type(self)]:
            link.strange = True
        return NotImplemented  # unequal, as objects are; no order, no sum

    return operate


def _method(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _ask(self, "special", name, *args, **kwargs)

    return method


def _contains(self: Any, value: Any) -> bool:
    if _stands_in(value) or "__iter__" not in _HELD[id(self)][0].told[type(self)]:
        return bool(_ask(self, "special", "__contains__", value))
    return any(value is item or value == item for item in self)


def _namespace(special: list[str]) -> dict[str, Any]:
    """Returns the special methods of a class of stand-ins."""
    made = {"__slots__": (), "__doc__": property(lambda self: _ask(self, "get", "__doc__"))}
    for name in special:
        plain = name.strip("_")
        if plain in SYMBOLS:
            made[name] = _operator(plain, False)
            if plain not in ("lt", "le", "gt", "ge", "eq", "ne"):
                made[f"__r{plain}__"] = _operator(plain, True)
        elif plain in ("str", "repr", "hash"):
            pass  # as all have them
        else:
            made[name] = _contains if plain == "contains" else _method(name)
    return made


class Link:
    """The link to the program: sends one request at a time, and serves the program's requests before it replies.

    Args:
        requests: a descriptor to write to.
        replies: one to read from.
    """

    def __init__(self, requests: int, replies: int) -> None:
        import json

        self._json = json
        self._lines = open(replies, encoding="utf-8")  # noqa: SIM115  (both are open until the process ends)
        self._out = open(requests, "w", encoding="utf-8")  # noqa: SIM115
        self._lines.readline()  # the program's walls stand
        self._objects: dict[int, Any] = {}  # the program's, by number
        self._given: list[Any] = []  # the objects of the test that were sent
        self._bases: dict[int, Any] = {}  # what objects are as plain data that cannot change
        self.told: dict[type, list[str]] = {}
        self.strange = False  # whether something could not be compared, or not be sent

    def ask(self, op: str, name: str, number: int | None = None, args: Any = (), kwargs: Any = None) -> Any:
        """Returns the program's reply.

        Raises:
            Exception: of the kind that the program raised; or TypeError: an argument cannot be sent.
        """
        wire = ValueCodec(self._refer, self._resolve)
        request = {"op": op, "name": name, "object": number}
        reply = self._exchange(request | {"args": wire.encode(tuple(args)), "kwargs": wire.encode(kwargs or {})})
        while "back" in reply:
            reply = self._exchange(self._serve(reply))
        try:
            if reply.get("printed"):
                sys.stdout.write(str(reply["printed"]))
            if "raised" in reply:
                error = self._error(reply)
            else:
                value = _MISSING if reply.get("missing") else wire.decode(reply["value"])
                if op in ("name", "get") and _is_trap(value):
                    value = _MISSING
                wire.change(reply.get("changed", ()))
                return value
        except Exception:  # no reply that this side writes: a test must not profit from catching it
            os._exit(1)
        raise error

    def base(self, number: int) -> Any:
        """Returns an object as plain data, or `_MISSING`."""
        if number in self._bases:
            return self._bases[number]
        base = self.ask("base", "", number)
        if isinstance(base, int | float | complex | str | bytes | tuple | frozenset):
            self._bases[number] = base
        return base

    def _exchange(self, request: Any) -> Any:
        sent = self._json.dumps(request) + "\n"
        try:
            self._out.write(sent)
            self._out.flush()
            reply = self._json.loads(self._lines.readline())
        except Exception:  # the program has ended, or has written what is no reply
            os._exit(1)
        if not isinstance(reply, dict):
            os._exit(1)
        return reply

    def _serve(self, request: Any) -> Any:
        """Serves a request of the program to a function or an iterator of the test."""
        wire = ValueCodec(self._refer, self._resolve)
        try:
            args, kwargs = wire.decode(request["args"]), wire.decode(request["kwargs"])
            target = self._given[request["theirs"]]
            before = wire.contents()
            value = next(target) if request["back"] == "next" else target(*args, **kwargs)
            return {"value": wire.encode(value), "changed": wire.changes(before)}
        except Exception as error:
            kind = next(k for k in type(error).__mro__ if k.__module__ == "builtins")
            args = error.args if all(isinstance(arg, str | int | None) for arg in error.args) else (str(error),)
            return {"raised": kind.__name__, "args": ValueCodec().encode(args)}

    def _error(self, reply: Any) -> BaseException:
        kind = self._resolve(reply["raised"]) if "class" in reply["raised"] else known_value(reply["raised"]["known"])
        assert issubclass(kind, Exception)
        blank: Any = kind
        args = ValueCodec(self._refer, self._resolve).decode(reply["args"])
        try:
            error = blank.__new__(blank) if isinstance(kind, StandInClass) else kind(*args)
        except Exception:  # its class takes other arguments than its content
            error = blank.__new__(blank)
        error.args = args
        number = int(reply["number"])
        self._objects[number] = error
        _HELD[id(error)] = self, number
        return error

    def _refer(self, value: Any) -> Any:
        if id(value) in _HELD and _HELD[id(value)][0] is self:
            return {"mine": _HELD[id(value)][1]}
        if isinstance(value, type(sys)):
            return {"module": value.__name__}
        iterator = hasattr(type(value), "__next__")
        if not iterator and not callable(value):
            self.strange = True
            raise TypeError(f"a test cannot give a {type(value).__name__} of its own to the program")
        self._given.append(value)
        return {"theirs": len(self._given) - 1, "iterator": iterator}

    def _resolve(self, wire: Any) -> Any:
        if "theirs" in wire:
            return self._given[wire["theirs"]]
        if "module" in wire:
            return __import__(wire["module"]) if wire["module"] in KNOWN else None
        if "object" in wire:
            number = int(wire["object"])
            if number not in self._objects:
                kind = self._class(wire["class"])
                self._objects[number] = made = kind.__new__(kind)
                _HELD[id(made)] = self, number
                if isinstance(made, BaseException):
                    made.args = self.ask("get", "args", number)
            return self._objects[number]
        return self._class(wire)

    def _class(self, wire: Any) -> Any:
        """Returns the class that stands for one of the program's; it is described once, then known by its number."""
        if "class" not in wire:
            return known_value(wire["known"])
        number = int(wire["class"])
        if number in self._objects:
            return self._objects[number]
        bases = [self._class(base) for base in wire["bases"]]
        special = [name for name in wire["special"] if name in SPECIAL]
        made = _namespace(special)
        exceptions = tuple(base for base in bases if issubclass(base, BaseException))
        real = known_value(wire["known"]) if "known" in wire else None
        if exceptions and isinstance(real, type) and issubclass(real, Exception):
            return real
        if exceptions:
            made = {"__str__": lambda self: str(_text(self)), "__getattr__": _attribute}
        elif wire.get("base") is not None:
            real = known_value(f"builtins:{wire['base']}")
            for name in ("eq", "ne", "lt", "le", "gt", "ge"):
                made.setdefault(f"__{name}__", _operator(name, False))
        else:
            made.setdefault("__eq__", _operator("eq", False))
        if real is not None:
            made["__class__"] = property(lambda self: real)  # as isinstance sees it
        if "__eq__" in made:
            made["__hash__"] = StandIn.__hash__
        kinds = exceptions or tuple(base for base in bases if issubclass(base, StandIn)) or (StandIn,)
        try:
            kind = StandInClass(str(wire["name"]), kinds, made)
        except TypeError:  # bases that go together there, and not here
            kind = StandInClass(str(wire["name"]), kinds[:1], made)
        self._objects[number] = kind
        self.told[kind] = special
        _HELD[id(kind)] = self, number
        return kind


def _text(error: Any) -> Any:
    return _ask(error, "special", "__str__") if id(error) in _HELD else ", ".join(map(str, error.args))


def _attribute(target: Any, name: str) -> Any:
    value = _ask(target, "get", name) if id(target) in _HELD else _MISSING
    if value is _MISSING:
        raise AttributeError(name)
    return value


class Names(dict):  # type: ignore[type-arg]  # Any is not there in the jail
    """The built-ins of a test: the values of names that it has not defined itself.

    Args:
        link: to the program.
        genuine: whether built-ins are always the real ones.
    """

    def __init__(self, link: Link, genuine: bool) -> None:
        super().__init__(builtins.__dict__)
        self._link, self._genuine = link, genuine
        self._defined = set(link.ask("names", ""))
        self.found: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        real = self.get(name, _MISSING)
        if real is _MISSING or (name in self._defined and not name.startswith("__")):
            value = self._link.ask("name", name)
            own = isinstance(value, StandInClass) and issubclass(value, Exception)
            if value is not _MISSING and (real is _MISSING or own or not self._genuine):
                self.found.add(name)
                return value
        if real is not _MISSING:
            return real
        raise KeyError(name)

    def shadowed(self) -> bool:
        """Returns whether the test found names of the program that hide built-ins, among others that do not."""
        return bool(self.found & builtins.__dict__.keys()) and not self.found <= builtins.__dict__.keys()


def _is_trap(value: Any) -> bool:
    """Returns whether catching this catches the failure of a test: the stand-in of a name that the program lacks."""
    return any(value is trap for trap in _TRAPS) or (isinstance(value, tuple) and any(map(_is_trap, value)))


def check(test: str, requests: int, replies: int, verdict: int, genuine: bool) -> None:
    """Runs a test; writes to the descriptor `verdict` whether it passes, and what it used."""
    import json

    code = compile(test, "test.py", "exec")
    link = Link(requests, replies)
    names = Names(link, genuine)
    space = _module("__main__")
    space["__builtins__"] = names
    passed = False
    try:
        exec(code, space)
        passed = True
    finally:
        said = {"passed": passed, "asked": bool(names.found), "shadowed": names.shadowed(), "strange": link.strange}
        os.write(verdict, json.dumps(said).encode())
