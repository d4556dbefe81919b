"""A test against a program says in the jails what it says in plain Python: values, objects, exceptions, names."""

from __future__ import annotations

import builtins
import contextlib
import io
import sys
import types
from typing import Any

import pytest

from hybridflow.rewards.sandbox import calls, standins, values
from hybridflow.rewards.sandbox.open import open_sandbox
from hybridflow.rewards.verifiable.code import score

SETTINGS = {"backend": "local", "seconds": 30, "parallel": 2}
PROGRAM = r'''
import collections, math, datetime, decimal, fractions, enum, dataclasses, typing, io, itertools, functools, re, random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
LIMIT = 7
NAMES = ["a", "b"]
TABLE = {"x": [1, 2], 3: (4, 5)}
PI = math.pi
class Error(Exception): pass
class Odd(Error, ValueError):
    def __init__(self, value):
        super().__init__(f"{value} is odd")
        self.value = value
class TimeoutError(Exception): pass
def fail(kind):
    if kind == "odd": raise Odd(3)
    if kind == "time": raise TimeoutError("late")
    if kind == "key": raise KeyError("k")
    if kind == "zero": 1 / 0
    if kind == "index": [][1]
    if kind == "stop": raise StopIteration
    if kind == "os": open("/nowhere/at/all")
    if kind == "decode": b"\xff".decode()
    if kind == "json": __import__("json").loads("{")
    if kind == "decimal": decimal.Decimal("x")
    if kind == "attribute": None.x
    return kind
Point = namedtuple("Point", "x y")
class Size(typing.NamedTuple):
    w: int
    h: int = 2
    def area(self): return self.w * self.h
@dataclasses.dataclass
class Item:
    name: str
    price: float = 1.5
    tags: list = dataclasses.field(default_factory=list)
@dataclasses.dataclass(frozen=True, order=True)
class Key:
    a: int
    b: int
class Color(enum.Enum):
    RED = 1
    GREEN = 2
class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2
class Stack(list):
    def peek(self): return self[-1]
class Bag(dict): pass
class Meters(float): pass
class Name(str):
    def shout(self): return self.upper() + "!"
class Vector:
    def __init__(self, *v): self.v = v
    def __add__(self, o): return Vector(*(a + b for a, b in zip(self.v, o.v)))
    def __eq__(self, o): return isinstance(o, Vector) and self.v == o.v
    def __hash__(self): return hash(self.v)
    def __repr__(self): return f"Vector{self.v}"
    def __len__(self): return len(self.v)
    def __getitem__(self, i): return self.v[i]
    def __iter__(self): return iter(self.v)
    def __contains__(self, x): return x in self.v
    def __abs__(self): return math.sqrt(sum(x * x for x in self.v))
    def __bool__(self): return any(self.v)
    def __neg__(self): return Vector(*(-x for x in self.v))
    def __lt__(self, o): return abs(self) < abs(o)
    def __call__(self, k): return self.v[k]
    def __enter__(self): return self
    def __exit__(self, *a): return False
    @property
    def first(self): return self.v[0]
    @staticmethod
    def zero(): return Vector(0, 0)
    @classmethod
    def ones(cls, n): return cls(*[1] * n)
    dimensions = 2
class Node:
    def __init__(self, value, next=None): self.value, self.next = value, next
def chain(*xs):
    node = None
    for x in reversed(xs): node = Node(x, node)
    return node
def walk(node):
    out = []
    while node: out.append(node.value); node = node.next
    return out
class Account:
    def __init__(self, n=0): self.n = n
    def add(self, n):
        if n < 0: raise Odd(n)
        self.n += n
        return self
class Matrix:
    def __init__(self, rows): self.rows = rows
    def __eq__(self, o): return self.rows == getattr(o, "rows", o)
def same(x): return x
def kind(x): return type(x).__name__
def push(xs, x): xs.append(x)
def deep(d): d["k"][0].add(9); d["new"] = [1]
def swap(xs): xs[0], xs[1] = xs[1], xs[0]
def sort_in_place(xs): xs.sort(); return xs
def fill(xs, ys): xs.extend(ys); ys.clear()
def alias(): a = [0]; return [a, a]
def loop(): a = [1]; a.append(a); return a
def gen(n):
    for i in range(n): yield i * i
def forever():
    n = 0
    while True:
        yield n
        n += 1
def apply(f, *a): return f(*a)
def mapped(f, xs): return [f(x) for x in xs]
def total(it): return sum(it)
def make_adder(n): return lambda x: x + n
def say(x): print("said", x)
@functools.lru_cache
def fib(n):
    """The n-th."""
    return n if n < 2 else fib(n - 1) + fib(n - 2)
def view(d): return d.keys()
def drawn(): return random.random()
def bump():
    global LIMIT
    LIMIT += 1
def sum(xs): return functools.reduce(lambda a, b: a + b, xs, 0)
def max(xs): return sorted(xs)[-1]
'''

# One test a paragraph. What is right of each is what plain Python says.
TESTS = r"""
assert same(Counter("aab")) == {"a": 2, "b": 1} and same(Counter("aab")).most_common(1) == [("a", 2)]

assert same(defaultdict(int, a=1)) == {"a": 1} and same(defaultdict(list))["q"] == []

assert same(OrderedDict(a=1, b=2)) != OrderedDict(b=2, a=1) and same(OrderedDict(a=1)) == {"a": 1}

assert same(deque([1, 2], 5)) == deque([1, 2]) and same(deque([1], 5)).maxlen == 5

assert Point(1, 2) == (1, 2) and Point(1, 2).x == 1 and isinstance(Point(1, 2), tuple)
assert same(Point(1, 2)) == Point(1, 2)

assert (1, 2) == Point(1, 2) and [Point(1, 2)] == [(1, 2)] and {Point(1, 2): 3}[(1, 2)] == 3

a, b = Point(3, 4)
assert (a, b) == (3, 4) and Point(x=1, y=2)._replace(x=5).x == 5 and Point(1, 2)._asdict() == {"x": 1, "y": 2}

assert len(Point(1, 2)) == 2 and Point(1, 2)[1] == 2 and Point(1, 2)[-1] == 2
assert sorted([Point(2, 1), Point(1, 2)])[0] == (1, 2)

assert Point(1, 2) + (3,) == (1, 2, 3) and 2 in Point(1, 2) and str(Point(1, 2)) == "Point(x=1, y=2)"

assert Size(3).area() == 6 and Size(3) == (3, 2)

assert Item("a") == Item("a") and Item("a") != Item("b") and Item("a").price == 1.5
assert repr(Item("a")) == "Item(name='a', price=1.5, tags=[])"

x = Item("a")
x.price = 3.0
x.tags.append(1)
assert x.price == 3.0

assert Key(1, 2) < Key(1, 3) and sorted([Key(2, 1), Key(1, 1)]) == [Key(1, 1), Key(2, 1)]
assert len({Key(1, 2), Key(1, 2)}) == 1

assert Color.RED is same(Color.RED) and Color.RED == Color.RED and Color.RED != Color.GREEN and Color.RED.value == 1
assert Color["RED"] is Color.RED

assert [c.name for c in Color] == ["RED", "GREEN"] and Color(2) is Color.GREEN and len(Color) == 2
assert Color.RED in Color

assert Level.HIGH == 2 and Level.HIGH > Level.LOW and Level.HIGH > 1 and Level.LOW + 1 == 2 and 1 + Level.LOW == 2
assert isinstance(Level.LOW, int) and Level.HIGH * 2 == 4

s = Stack()
s.append(3)
assert s == [3] and s.peek() == 3 and [3] == s and len(s) == 1 and s[0] == 3 and isinstance(s, list)
assert list(s) == [3] and s != [4]

assert Bag(a=1) == {"a": 1} and Bag(a=1)["a"] == 1 and "a" in Bag(a=1) and list(Bag(a=1).items()) == [("a", 1)]

assert Meters(2.5) == 2.5 and Meters(2.5) * 2 == 5 and Meters(2) < 3 and float(Meters(1)) == 1.0
assert round(Meters(2.6)) == 3 and abs(Meters(-1) - 0) == 1

assert Name("a") == "a" and Name("a").shout() == "A!" and Name("a") + "b" == "ab" and "b" + Name("a") == "ba"
assert len(Name("abc")) == 3 and Name("a") in ["a"]

assert Vector(1, 2) + Vector(3, 4) == Vector(4, 6) and Vector(1, 2) != Vector(1, 3) and not Vector(0, 0) and Vector(1)

assert abs(Vector(3, 4)) == 5 and len(Vector(1, 2)) == 2 and Vector(1, 2)[1] == 2 and list(Vector(1, 2)) == [1, 2]
assert 2 in Vector(1, 2) and 3 not in Vector(1, 2)

assert -Vector(1, 2) == Vector(-1, -2) and Vector(1) < Vector(2) and Vector(5, 6)(1) == 6
assert Vector(1, 2).first == 1 and Vector.zero() == Vector(0, 0)

assert Vector.ones(3) == Vector(1, 1, 1) and Vector.dimensions == 2 and isinstance(Vector(1), Vector)
assert repr(Vector(1, 2)) == "Vector(1, 2)" and f"{Vector(1, 2)}" == "Vector(1, 2)"

assert {Vector(1): "a"}[Vector(1)] == "a" and Vector(1) in [Vector(2), Vector(1)]
assert max([Vector(1), Vector(2)]) == Vector(2)

with Vector(1, 2) as v:
    assert v.first == 1

assert walk(chain(1, 2, 3)) == [1, 2, 3] and chain(1, 2).next.value == 2 and chain(1).next is None and chain() is None

n = Node(1, Node(2))
n.next.next = Node(3)
assert walk(n) == [1, 2, 3]

a = Account(5)
assert a.add(3) is a and a.n == 8 and Account().n == 0

try:
    Account().add(-1)
    assert False
except Odd as e:
    assert e.value == -1 and str(e) == "-1 is odd" and e.args == ("-1 is odd",)
    assert isinstance(e, ValueError) and isinstance(e, Error)

try:
    fail("odd")
except Error as e:
    assert type(e).__name__ == "Odd"
else:
    assert False

try:
    fail("odd")
except ValueError:
    pass
else:
    assert False

try:
    fail("time")
    assert False
except TimeoutError as e:
    assert str(e) == "late"

try:
    fail("key")
    assert False
except KeyError as e:
    assert e.args == ("k",)

for k, kind_of in {
    "zero": ZeroDivisionError, "index": IndexError, "os": FileNotFoundError, "decode": UnicodeDecodeError,
    "attribute": AttributeError,
}.items():
    try:
        fail(k)
    except kind_of:
        continue
    assert False, k

import json, decimal
for k, kind_of in [
    ("json", json.JSONDecodeError), ("json", ValueError), ("decimal", decimal.InvalidOperation),
    ("decimal", ArithmeticError),
]:
    try:
        fail(k)
    except kind_of:
        continue
    assert False, k

try:
    fail("stop")
    assert False
except StopIteration:
    pass

assert LIMIT == 7 and NAMES == ["a", "b"] and TABLE["x"] == [1, 2] and TABLE[3] == (4, 5)
assert abs(PI - 3.14159265) < 1e-6

xs = [1]
assert push(xs, 2) is None and xs == [1, 2]

d = {"k": [{1}], "other": 5}
deep(d)
assert d == {"k": [{1, 9}], "other": 5, "new": [1]}

inner = {1}
d = {"k": [inner]}
deep(d)
assert inner == {1, 9} and d["k"][0] is inner

xs = [2, 1]
swap(xs)
assert xs == [1, 2]

xs = [3, 1, 2]
assert sort_in_place(xs) is xs and xs == [1, 2, 3] and same(xs) is xs

a, b = [1], [2]
fill(a, b)
assert a == [1, 2] and b == []

a = alias()
a[0].append(1)
assert a[1] == [0, 1]

a = loop()
assert a[0] == 1 and a[1] is a

assert list(gen(4)) == [0, 1, 4, 9] and next(gen(3)) == 0 and [x for x in gen(3)] == [0, 1, 4] and 4 in gen(5)

g = gen(2)
assert next(g) == 0 and next(g) == 1 and next(g, None) is None

import itertools
assert list(itertools.islice(forever(), 3)) == [0, 1, 2] and list(zip(forever(), "ab")) == [(0, "a"), (1, "b")]

assert apply(lambda x: x + 1, 2) == 3 and mapped(str, [1]) == ["1"] and mapped(len, ["ab"]) == [2]
assert mapped(str.upper, ["a"]) == ["A"]

assert mapped(lambda x: same(x) * 2, [1, 2]) == [2, 4] and apply(max, [1, 3]) == 3

def boom(x):
    raise KeyError("mine")
try:
    apply(boom, 1)
    assert False
except KeyError as e:
    assert e.args == ("mine",)

assert total(x for x in [1, 2]) == 3 and total(range(4)) == 6 and total(iter([1, 2])) == 3 and total({1, 2}) == 3
assert total({1: 2}.values()) == 2

assert make_adder(2)(3) == 5 and list(map(make_adder(1), [1])) == [2] and callable(make_adder(1)) and callable(same)
assert not callable(LIMIT)

import io, contextlib
out = io.StringIO()
with contextlib.redirect_stdout(out):
    say(5)
assert out.getvalue() == "said 5\n"

assert fib(20) == 6765 and fib.__name__ == "fib" and fib.__doc__ == "The n-th." and fib.cache_info().hits > 0

assert view({"a": 1}) == {"a"} and list(view({"a": 1})) == ["a"] and view({"a": 1}) == {"a": 2}.keys()

assert same(range(3)) == range(3) and list(same(range(3))) == [0, 1, 2] and same(slice(1, 2)) == slice(1, 2)

assert same(frozenset([1])) == {1} and same({1, (2, 3)}) == {1, (2, 3)} and same(()) == () and same((1,)) != [1]
assert same([1]) != (1,)

assert same(float("inf")) == float("inf") and same(float("nan")) != same(float("nan")) and same(-0.0) == 0.0
assert str(same(-0.0)) == "-0.0"

assert same(10**5000) == 10**5000 and same(-(10**30)) == -(10**30) and same(2**62) == 2**62 and same(True) is True
assert same(None) is None

assert same(1 + 2j) == 1 + 2j and same(b"\x00a") == b"\x00a" and same(bytearray(b"a")) == b"a"
assert same("\ud83d\x00\n") == "\ud83d\x00\n"

assert same(...) is ... and same(int) is int and same(len) is len and same(Counter) is Counter

import decimal, fractions, datetime
assert same(decimal.Decimal("1.10")) == decimal.Decimal("1.1") and str(same(decimal.Decimal("1.10"))) == "1.10"
assert same(fractions.Fraction(1, 3)) == fractions.Fraction(1, 3)

assert same(decimal.Decimal(1)) == 1 and same(fractions.Fraction(1, 2)) == 0.5

import datetime
d = datetime.datetime(2020, 1, 2, 3, 4, 5, 6, tzinfo=datetime.timezone.utc)
assert same(d) == d and same(d.date()) == datetime.date(2020, 1, 2)
assert same(datetime.timedelta(1, 2)) == datetime.timedelta(1, 2) and same(datetime.time(1)) == datetime.time(1)

assert math.isclose(same(0.1) + 0.2, 0.3) and collections.Counter("a") == {"a": 1}

assert sum([1, 2, 3]) == 6 and max([3, 1]) == 3

assert kind(1) == "int" and kind(()) == "tuple" and kind({1: 2}.keys()) == "dict_keys" and kind(range(1)) == "range"
assert kind(Counter()) == "Counter" and kind(Point(1, 2)) == "Point"

assert Node(1) != Node(1) and Node(1) != 1 and not (Node(1) == None) and Node(1) is not None and Node(1)

assert hasattr(Node(1), "value") and not hasattr(Node(1), "nothing") and getattr(Node(1), "value") == 1
assert isinstance(Node(1), Node) and not isinstance(1, Node)

assert issubclass(Odd, Error) and issubclass(Odd, ValueError)

assert isinstance(Odd(3), Odd) and isinstance(same(ValueError("x")), ValueError)

assert type(Item("a")) is Item and type(Item("a")).__name__ == "Item" and Item.__name__ == "Item"

def check(candidate):
    assert candidate([1]) == [1]
    for n in range(5):
        assert candidate(n) == n
check(same)

assert undefined_name(1) == 1

assert same(1) == 2

assert push([1], 1) == [1, 1]

assert Vector(1, 2) == (1, 2)

assert Node(1) == 1

assert Color.RED == 1

assert Stack([1]) == [2]

assert len(Node(1)) == 1

assert Node(1) < Node(2)

assert [] == gen(0)

assert gen(2)[0] == 0

assert same({1}) == [1]

assert same((1, 2)) == [1, 2]

assert Point(1, 2) == [1, 2]

fail("odd")

assert isinstance(same(1), str)

bump()
assert LIMIT == 8
""".strip("\n").split("\n\n")

# What does not cross, and so fails where plain Python passes: documented in docs/sandbox.md, and named in the score
# where a stand-in sees it.
REFUSED = {
    "assert Matrix([[1]]) == [[1]]": True,  # no == of the program's decides against a value of the test's
    "assert same(object()) is not None": True,  # a test cannot give an object of its own
    "assert issubclass(Stack, list)": False,
    "import random\nrandom.seed(1)\nx = random.random()\nrandom.seed(1)\nassert drawn() == x": False,
    "NAMES.append(1)\nassert NAMES[-1] == 1": False,  # a constant is a copy each time
}


def plainly(program: str, test: str) -> bool:
    """What plain Python says, with the program and the test in one namespace."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # where dataclasses and enums look for themselves
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(program, module.__dict__)
            exec(test, module.__dict__)
    except Exception:
        return False
    finally:
        del sys.modules["solution"]
    return True


def in_one_jail(program: str, tests: dict[str, bool]) -> list[str]:
    """Those tests of which the jails say something else; all in one pair of jails, one by one where that fails."""
    lines = ["def said(text):", "    try: exec(text, {})", "    except Exception: return False", "    return True"]
    lines += [f"assert said({test!r}) is {right}" for test, right in tests.items()]
    sandbox = open_sandbox(SETTINGS)
    if sandbox.check(program, "\n".join(lines)).status == "ok":
        return []
    return [test for test, right in tests.items() if (sandbox.check(program, test).status == "ok") != right]


def test_values_objects_and_exceptions_are_as_in_plain_python() -> None:
    said = {test: plainly(PROGRAM, test) for test in TESTS}
    assert sum(said.values()) >= 75 and sum(not right for right in said.values()) >= 15
    assert in_one_jail(PROGRAM, said) == []


def test_what_does_not_cross_is_refused_and_named() -> None:
    for test, named in REFUSED.items():
        assert plainly(PROGRAM, test), test
        given = score(PROGRAM, [test], sandbox=SETTINGS)
        assert (given["score"], given["not_plain"]) == (0, float(named)), test


# --- names ---

JAILS = {name for module in (calls, standins, values) for name in vars(module) if not name.startswith("__")}
PRELUDE = {*calls._MODULES.split(), *" ".join(calls._IMPORTED.values()).split()}
_SITE = {"copyright", "credits", "exit", "help", "license", "quit", "_"}  # which are of `site`, not of the language
BUILTINS = {*dir(builtins)} - {"None", "True", "False", *_SITE}
NAMES = sorted({*JAILS, *PRELUDE, *BUILTINS} - {name for name in BUILTINS if name.startswith("__")})


@pytest.mark.parametrize("among", ["built-ins", "others"])
def test_every_name_of_a_test_is_the_programs_where_the_program_defines_it(among: str) -> None:
    assert len(NAMES) > 250 and {"factorial", "lcm", "merge", "sum", "StandIn", "ValueCodec", "check", "print"} <= set(
        NAMES
    )
    program = "\n".join(f"def {name}(*given): return {name + '!'!r}, given" for name in NAMES)
    names = [name for name in NAMES if (name in BUILTINS) == (among == "built-ins")]
    test = "\n".join(f"assert {name}(1, 2) == ({name + '!'!r}, (1, 2))" for name in names)
    outcome = open_sandbox(SETTINGS).check(program, test)
    assert (outcome.status, outcome.asked, outcome.shadowed) == ("ok", True, False)


def test_no_name_of_the_jails_is_found_where_the_program_defines_nothing() -> None:
    unknown = [name for name in NAMES if name not in BUILTINS]
    assert len(unknown) > 100
    lines = [f"try: {name}\nexcept NameError: pass\nelse: raise AssertionError" for name in unknown]
    outcome = open_sandbox(SETTINGS).check("def f(): return list(map(gcd, [4], [6]))", "\n".join(lines))
    assert (outcome.status, outcome.asked) == ("ok", False)


@pytest.mark.parametrize(
    ("program", "tests", "right"),
    [
        ("", ["assert factorial(5) == 120"], 0),
        ("def f(x): return factorial(x)", ["assert factorial(5) == 120"], 0),  # not even where a program may use it
        ("def lcm(a, b): return 0", ["assert lcm(4, 6) == 12"], 0),
        ("def lcm(a, b): return 12", ["assert lcm(4, 6) == 12"], 1),
        ("from math import lcm", ["assert lcm(4, 6) == 12"], 1),
        ("def merge(a, b): return sorted(a + b)", ["assert merge([2], [1]) == [1, 2]"], 1),
        ("def sum(a, b): return 6", ["assert sum(10, 15) == 6"], 1),  # MBPP has it
        ("", ["assert sum([1, 2, 3]) == 6"], 0),
        ("def other(): pass", ["assert sum([1, 2, 3]) == 6"], 0),
        ("def f(x): return x", ["assert len('abc') == 3", "assert f(1) == 1"], 1),
        ("def max(a, b): return a\ndef top(x): return 2", ["assert max(3, 5) == 5\nassert top([1, 2]) == 2"], 0),
        ("def max(a, b): return a if a > b else b\ndef f(a, b): return max(a, b)", ["assert f(1, 2) == 2"], 1),
        ("def print(x): return x\ndef f(x): return print(x)", ["assert f(1) == 1"], 1),
        ("def abs(x): return 0\ndef f(x): return 0", ["assert abs(f(3) - 7) < 1e-6"], 0),
        ("def abs(x): return x if x > 0 else -x\ndef f(x): return 7", ["assert abs(f(3) - 7) < 1e-6"], 1),
        ("set = sorted = lambda x: 0\ndef f(x): return x", ["assert set(f([1])) == set([2])"], 0),
        ("class math:\n    isclose = lambda *a: True\ndef f(x): return 0", ["assert math.isclose(f(3), 7)"], 0),
        ("def f(x): return 7.0000000001", ["assert math.isclose(f(3), 7)"], 1),
        ("E = AssertionError\ndef f(x): return 0", ["try:\n    f(1)\n    assert False\nexcept E: pass"], 0),
        ("ValueError = Exception\ndef f(x): 0", ["try:\n    f(1)\n    assert False\nexcept ValueError: pass"], 0),
        ("class E(Exception): pass\ndef f(x): raise E", ["try:\n    f(1)\n    assert False\nexcept E: pass"], 1),
        ("def f(xs: List[int]) -> int: return len(xs)", ["assert f([1]) == 1"], 1),  # as HumanEval's prompts import it
        ("def f(xs): return gcd(4, 6)", ["assert f([1]) == 2"], 0),  # plain Python knows no gcd
        ("class Solution:\n    def f(self, x): return 2", ["assert f(1) == 2"], 0),
    ],
)
def test_whose_a_name_is(program: str, tests: list[str], right: int) -> None:
    assert score(program, tests, sandbox=SETTINGS)["score"] == right


def test_a_judge_finds_only_what_the_program_defines() -> None:
    truth: dict[str, Any] = {"fn_name": "factorial", "inputs": [[5]], "outputs": [120]}
    assert score("def g(x): return factorial(x)", truth, sandbox=SETTINGS)["score"] == 0
    assert score("def factorial(x): return math.factorial(x)", truth, sandbox=SETTINGS)["score"] == 1
