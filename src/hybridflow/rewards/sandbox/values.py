"""How values travel between jails: plain data as JSON, everything else as a reference that the two sides resolve.

Executed inside jails before `calls.py` or `standins.py`, in one namespace with them, and by the trusted side for the
arguments of calls. Nothing that arrives is trusted: only types of the tables here are ever made. Standard library only.

**Plain data** arrives unchanged: None, numbers, texts, bytes, lists, tuples, dicts, sets, ranges, slices, views of
dicts, and of the standard library Counter, OrderedDict, defaultdict, deque, Decimal, Fraction and dates. A mutable
container has a number, so that one that occurs twice is one object on the other side too. Functions and classes of the
modules in `KNOWN` arrive as the other side's own.
"""

from __future__ import annotations

import builtins
import sys

TYPE_CHECKING = False  # typing itself takes longer to import than most programs run
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

DEEPEST = 200  # levels of nesting
_ATOMS = (type(None), bool, int, str)
_BUILT_IN = (float, complex, bytes, bytearray, list, tuple, dict, set, frozenset)
_MUTABLE = (
    "list dict set bytearray collections.Counter collections.OrderedDict collections.defaultdict collections.deque"
)
_DICTS = ("dict", "collections.Counter", "collections.OrderedDict")
_VIEWS = ("dict_keys", "dict_values", "dict_items")
# What is made anew from its parts, by these names.
_PARTS = {
    "range": "start stop step",
    "slice": "start stop step",
    "fractions.Fraction": "numerator denominator",
    "datetime.date": "year month day",
    "datetime.time": "hour minute second microsecond tzinfo",
    "datetime.datetime": "year month day hour minute second microsecond tzinfo",
    "datetime.timedelta": "days seconds microseconds",
}
# Their functions and classes only compute: those of the other side do the same.
_KNOWN = (
    "bisect builtins cmath collections copy datetime decimal fractions functools heapq itertools json math numbers "
    "operator re statistics string typing"
)
KNOWN = _KNOWN.split()
_ACTS = "breakpoint compile delattr eval exec exit globals help input locals open quit setattr vars"


class ValueCodec:
    """One request with its reply: the numbers of what was written and read are valid for its duration.

    Args:
        refer: makes the reference to a value that is not plain data.
        resolve: returns the value of a reference.
        shared: whether containers have numbers, and objects that are also plain data are references.
    """

    def __init__(
        self,
        refer: Callable[[Any], Any] | None = None,
        resolve: Callable[[Any], Any] | None = None,
        *,
        shared: bool = True,
    ) -> None:
        self.refer, self.resolve, self.shared = refer, resolve, shared
        self.held: list[Any] = []
        self._numbers: dict[int, int] = {}

    def encode(self, value: Any, depth: int = 0) -> Any:
        """Returns a value in a form that JSON can hold.

        Raises:
            TypeError: it is not plain data, and nothing refers to it.
        """
        kind = type(value)
        if kind in _ATOMS:
            return {"int": hex(value)} if kind is int and value.bit_length() > 62 else value
        if depth > DEEPEST:
            raise TypeError("nested too deeply")
        tag = _tag(kind)
        if tag is None and not self.shared:
            base = base_of(kind)
            if base in (int, str):
                return self.encode(base_value(value))
            tag = None if base is None else base.__name__
        if isinstance(value, Exception) and known_name(kind) is not None:
            return {"exception": [known_name(kind), *(self.encode(arg, depth + 1) for arg in value.args)]}
        if tag is None:
            known = known_name(value)
            if known is not None:
                return {"known": known}
            if self.refer is None:
                raise TypeError(f"{kind.__name__} is not plain data")
            return self.refer(value)
        if self.shared and tag in _MUTABLE.split():
            if id(value) in self._numbers:
                return {"same": self._numbers[id(value)]}
            self._hold(value)
        return self.content(value, tag, depth)

    def content(self, value: Any, tag: str, depth: int = 0) -> Any:
        """Returns the content of a value of that kind, whether or not it has a number."""

        def each(items: Any) -> list[Any]:
            return [self.encode(item, depth + 1) for item in items]

        if tag == "list":
            return each(value)
        if tag in ("float", "complex"):
            return {tag: getattr(builtins, tag).__repr__(value)}
        if tag in ("bytes", "bytearray"):
            return {tag: value.hex()}
        if tag == "decimal.Decimal":
            return {tag: str(value)}
        if tag == "datetime.timezone":
            return {tag: each([value.utcoffset(None)])}
        if tag in _PARTS:
            return {tag: each(getattr(value, name) for name in _PARTS[tag].split())}
        if tag in _DICTS:
            return {tag: [each(pair) for pair in value.items()]}
        if tag == "collections.defaultdict":
            return {tag: [self.encode(value.default_factory, depth + 1), *(each(pair) for pair in value.items())]}
        if tag == "collections.deque":
            return {tag: [value.maxlen, *each(value)]}
        return {tag: each(value)}

    def decode(self, wire: Any, *, new: bool = True) -> Any:
        """Returns the value that was encoded.

        Args:
            wire: what `encode` wrote.
            new: whether a container at the top gets a number.

        Raises:
            ValueError: it is not what `encode` writes.
            TypeError: a set or a dict of what cannot be hashed.
        """
        if isinstance(wire, list):
            made: list[Any] = []
            if new:
                self._hold(made)
            made += map(self.decode, wire)
            return made
        if not isinstance(wire, dict):
            return wire
        if len(wire) != 1 and self.resolve is not None:
            return self.resolve(wire)
        ((tag, held),) = wire.items()
        if tag == "same":
            return self.held[held]
        if tag == "int":
            return int(held, 16)
        if tag == "known":
            return known_value(held)
        if tag == "exception":
            kind = known_value(held[0])
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise ValueError(f"{held[0]} is no exception")  # or any known function could be called here
            return kind(*map(self.decode, held[1:]))
        if tag in _MUTABLE.split():
            return self._container(tag, held, new)
        if tag in ("tuple", "frozenset"):
            return getattr(builtins, tag)([self.decode(v) for v in held])
        if tag in ("float", "complex"):
            return getattr(builtins, tag)(held)
        if tag == "bytes":
            return bytes.fromhex(held)
        if tag in ("decimal.Decimal", "datetime.timezone", *_PARTS):
            return _named(tag)(*([held] if tag == "decimal.Decimal" else map(self.decode, held)))
        if tag in _VIEWS:
            items = [self.decode(v) for v in held]
            if tag == "dict_items":
                return dict(items).items()
            return dict.fromkeys(items).keys() if tag == "dict_keys" else dict(enumerate(items)).values()
        if self.resolve is None:
            raise ValueError(f"not an encoded value: {str(tag)[:40]}")
        return self.resolve(wire)

    def _container(self, tag: str, held: Any, new: bool) -> Any:
        container: Any
        if tag == "bytearray":
            container = bytearray.fromhex(held)
        elif tag == "collections.defaultdict":
            container = _named(tag)(self.decode(held[0]))
        elif tag == "collections.deque":
            container = _named(tag)((), held[0])
        else:
            container = _named(tag)()
        if new:
            self._hold(container)  # before what is in it, which may be itself
        if tag == "set":
            container.update([self.decode(v) for v in held])
        elif tag == "collections.deque":
            container.extend([self.decode(v) for v in held[1:]])
        elif tag != "bytearray":
            for pair in held[tag == "collections.defaultdict" :]:
                key, value = map(self.decode, pair)
                container[key] = value
        return container

    def contents(self) -> list[Any]:
        """Returns the content of every container that has a number now."""
        return [self.content(held, str(_tag(type(held)))) for held in self.held[:]]

    def changes(self, before: list[Any]) -> list[Any]:
        """Returns number and content of the containers whose content has changed."""
        now = (self.content(held, str(_tag(type(held)))) for held in self.held[: len(before)])
        return [[n, content] for n, (content, was) in enumerate(zip(now, before)) if content != was]

    def change(self, changes: Any) -> None:
        """Applies the changes of the other side here."""
        for number, content in changes:
            old, new = self.held[number], self.decode(content, new=False)
            if isinstance(old, list | bytearray):
                old[:] = new
                continue
            old.clear()
            if isinstance(old, dict):
                for key, value in new.items():
                    old[key] = value
            elif isinstance(old, set):
                old.update(new)
            else:
                old.extend(new)

    def _hold(self, value: Any) -> None:
        self._numbers[id(value)] = len(self.held)
        self.held.append(value)


def _tag(kind: type) -> str | None:
    """Returns the name of a type of plain data. Types are compared exactly: a subclass could be anything."""
    if kind in _BUILT_IN or kind in (range, slice):
        return kind.__name__
    if kind.__module__ == "builtins":
        return kind.__name__ if kind.__name__ in _VIEWS and kind in map(type, _views()) else None
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in _MUTABLE.split() or name in _DICTS or name in _PARTS or name in ("decimal.Decimal", "datetime.timezone"):
        return name if getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind else None
    return None


def _views() -> tuple[Any, ...]:
    empty: dict[Any, Any] = {}
    return empty.keys(), empty.values(), empty.items()


def _named(tag: str) -> Any:
    module, _, name = tag.rpartition(".")
    return getattr(__import__(module or "builtins"), name)


def base_of(kind: type) -> type | None:
    """Returns the type of plain data that a class is derived from."""
    return next((base for base in kind.__mro__ if base in (*_ATOMS, *_BUILT_IN)), None)


def base_value(value: Any) -> Any:
    """Returns the value of a number or a text without its class."""
    return int.__index__(value) if isinstance(value, int) else str.__str__(value)


def known_name(value: Any) -> str | None:
    """Returns module and name of a function or a class that both sides have."""
    owner = getattr(value, "__objclass__", value)  # of a method such as str.upper
    module, name = getattr(owner, "__module__", None), getattr(value, "__qualname__", None)
    if value is Ellipsis or value is NotImplemented:
        module, name = "builtins", "Ellipsis" if value is Ellipsis else "NotImplemented"
    if type(module) is not str or type(name) is not str:
        return None
    module = module.lstrip("_")  # of what is written in C
    if module.split(".")[0] not in KNOWN or name in _ACTS.split() or "_" in {part[:1] for part in name.split(".")}:
        return None
    found = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is value else None


def known_value(name: str) -> Any:
    """Returns the object that `known_name` named.

    Raises:
        ValueError: it is not such a name.
    """
    module, _, path = name.partition(":")
    if module.split(".")[0] not in KNOWN:
        raise ValueError(f"{module} is not known")
    __import__(module)
    found = sys.modules[module]
    for part in path.split("."):
        found = getattr(found, part)
    if known_name(found) != name:
        raise ValueError(f"{name} is not known")
    return found
