"""Small reference programs, inputs for them, and mutants that plain Python tells apart from them.

A line of `FUNCTIONS` is a function: its name, the kinds of its arguments (i: an int, l: a list of ints, s: a text,
w: a list of texts, m: a list of lists, d: a dict), and what it returns. None has a loop that a mutant could not end.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

INPUTS: dict[str, tuple[Any, ...]] = {
    "i": (7, 2, 12, -3, 10, 1, 0),
    "l": ([3, 1, 2], [5, 5, 1, 8], [-2, 4, 0, 9, 4], [10], []),
    "s": ("abba", "Hello World", "a1b2c3", "xyz xyz", ""),
    "w": (["pear", "fig", "apple"], ["a", "bb", "a"], ["Zoo", "ant", "Bee", "ant"], []),
    "m": ([[1, 2], [3, 4]], [[5, 0, 1], [2, 2, 2], [9, 8, 7]], [[7]]),
    "d": ({"a": 3, "b": 1}, {"x": 5, "y": 5, "z": -2}, {}),
}

FUNCTIONS = """
add ii a + b
subtract ii a - b
multiply ii a * b
floor_divide ii a // b
remainder ii a % b
power_of_two i 2 ** (a % 8)
square i a * a
cube i a ** 3
double i 2 * a
half i a / 2
negate i -a
absolute i a if a >= 0 else -a
sign i (a > 0) - (a < 0)
is_even i a % 2 == 0
is_odd i a % 2 == 1
is_positive i a > 0
is_leap i (a % 4 == 0 and a % 100 != 0) or a % 400 == 0
maximum ii a if a > b else b
minimum ii a if a < b else b
max_of_three iii max(a, b, c)
middle_of_three iii sorted([a, b, c])[1]
clamp iii max(b, min(a, c))
average ii (a + b) / 2
digit_sum i sum(int(x) for x in str(abs(a)))
digit_count i len(str(abs(a)))
last_digit i abs(a) % 10
first_digit i int(str(abs(a))[0])
reverse_digits i int(str(abs(a))[::-1])
triangular i a * (a + 1) // 2
sum_of_squares i sum(x * x for x in range(1, a + 1))
sum_of_odd i sum(x for x in range(a + 1) if x % 2 == 1)
sum_of_even i sum(x for x in range(a + 1) if x % 2 == 0)
fact i [p := 1, *[p := p * x for x in range(2, a + 1)]][-1]
divisors i [x for x in range(1, abs(a) + 1) if a % x == 0]
divisor_count i sum(1 for x in range(1, abs(a) + 1) if a % x == 0)
is_prime i a > 1 and all(a % x for x in range(2, a))
primes_to i [n for n in range(2, a + 1) if all(n % x for x in range(2, n))]
is_perfect i a > 1 and sum(x for x in range(1, a) if a % x == 0) == a
is_square i any(x * x == a for x in range(abs(a) + 1))
multiples ii [a * x for x in range(1, abs(b) + 1)]
common_divisors ii [x for x in range(1, min(abs(a), abs(b)) + 1) if a % x == 0 and b % x == 0]
greatest_common ii max(x for x in range(1, min(abs(a), abs(b)) + 1) if a % x == 0 and b % x == 0)
to_binary i bin(abs(a))[2:]
count_ones i bin(abs(a)).count("1")
to_hex i hex(abs(a))[2:]
celsius i (a - 32) * 5 / 9
fahrenheit i a * 9 / 5 + 32
hypotenuse_squared ii a * a + b * b
rectangle_area ii a * b
rectangle_perimeter ii 2 * (a + b)
triangle_area ii a * b / 2
box_volume iii a * b * c
is_triangle iii a + b > c and b + c > a and a + c > b
distance_on_line ii abs(a - b)
compound ii a * (1 + b / 100)
percent ii a * 100 / b
quotient_and_rest ii (a // b, a % b)
swapped ii (b, a)
in_range iii b <= a <= c
between iii b < a < c
xor ii a ^ b
bit_and ii a & b
bit_or ii a | b
shift i abs(a) << 2
collatz_next i a // 2 if a % 2 == 0 else 3 * a + 1
countdown i list(range(a, 0, -1))
fizz i "FizzBuzz" if a % 15 == 0 else "Fizz" if a % 3 == 0 else "Buzz" if a % 5 == 0 else str(a)
grade i "A" if a > 9 else "B" if a > 5 else "C"
stars i "*" * a
squares_to i [x * x for x in range(a + 1)]
table i [[x * y for x in range(1, 4)] for y in range(1, abs(a) % 4 + 1)]
total l sum(a)
product l [p := 1, *[p := p * x for x in a]][-1]
largest l max(a)
smallest l min(a)
spread l max(a) - min(a)
mean l sum(a) / len(a)
median_low l sorted(a)[(len(a) - 1) // 2]
size l len(a)
first l a[0]
last l a[-1]
second_largest l sorted(set(a))[-2]
without_first l a[1:]
without_last l a[:-1]
every_second l a[::2]
reversed_list l a[::-1]
ascending l sorted(a)
descending l sorted(a, reverse=True)
unique l sorted(set(a))
unique_in_order l [x for i, x in enumerate(a) if x not in a[:i]]
has_duplicates l len(set(a)) < len(a)
duplicates l sorted({x for x in a if a.count(x) > 1})
evens l [x for x in a if x % 2 == 0]
odds l [x for x in a if x % 2 == 1]
positives l [x for x in a if x > 0]
negatives l [x for x in a if x < 0]
doubled l [2 * x for x in a]
squared l [x * x for x in a]
shifted l [x + 1 for x in a]
is_sorted l all(x <= y for x, y in zip(a, a[1:]))
is_strictly_rising l all(x < y for x, y in zip(a, a[1:]))
differences l [y - x for x, y in zip(a, a[1:])]
running_total l [sum(a[: i + 1]) for i in range(len(a))]
running_max l [max(a[: i + 1]) for i in range(len(a))]
index_of_max l a.index(max(a))
index_of_min l a.index(min(a))
count_of li a.count(b)
contains li b in a
above li [x for x in a if x > b]
below li [x for x in a if x < b]
at_least li sum(1 for x in a if x >= b)
times li [x * b for x in a]
plus li [x + b for x in a]
divisible li [x for x in a if x % b == 0]
taken li a[:b]
dropped li a[b:]
rotated li a[b % max(1, len(a)) :] + a[: b % max(1, len(a))]
chunks li [a[i : i + max(1, b)] for i in range(0, len(a), max(1, b))]
pairs_with_sum li [(x, y) for i, x in enumerate(a) for y in a[i + 1 :] if x + y == b]
nearest li min(a, key=lambda x: (abs(x - b), x))
k_largest li sorted(a, reverse=True)[: abs(b)]
append li a + [b]
prepend li [b] + a
remove_all li [x for x in a if x != b]
joined ll a + b
zipped ll [(x, y) for x, y in zip(a, b)]
added ll [x + y for x, y in zip(a, b)]
dot ll sum(x * y for x, y in zip(a, b))
common ll sorted(set(a) & set(b))
either ll sorted(set(a) | set(b))
only_first ll sorted(set(a) - set(b))
merged ll sorted(a + b)
equal_lists ll a == b
is_subset ll set(a) <= set(b)
interleaved ll [x for p in zip(a, b) for x in p]
sum_of_extremes l max(a) + min(a)
product_of_extremes l max(a) * min(a)
alternating_sum l sum(x if i % 2 == 0 else -x for i, x in enumerate(a))
sum_of_positives l sum(x for x in a if x > 0)
count_positive l sum(x > 0 for x in a)
max_gap l max(y - x for x, y in zip(sorted(a), sorted(a)[1:]))
best_slice l max(sum(a[i:j]) for i in range(len(a)) for j in range(i + 1, len(a) + 1))
inversions l sum(a[i] > a[j] for i in range(len(a)) for j in range(i + 1, len(a)))
peaks l [a[i] for i in range(1, len(a) - 1) if a[i] > a[i - 1] and a[i] > a[i + 1]]
mode l min(a, key=lambda x: (-a.count(x), x))
frequencies l {str(x): a.count(x) for x in a}
positions l {str(x): i for i, x in enumerate(a)}
moved_zeros l [x for x in a if x != 0] + [x for x in a if x == 0]
partitioned l [[x for x in a if x % 2 == 0], [x for x in a if x % 2 == 1]]
as_text l ", ".join(str(x) for x in a)
as_number l int("0" + "".join(str(abs(x)) for x in a))
length s len(a)
reverse s a[::-1]
upper s a.upper()
lower s a.lower()
swapcase s a.swapcase()
title s a.title()
is_palindrome s a == a[::-1]
vowels s sum(x in "aeiou" for x in a.lower())
consonants s sum(x.isalpha() and x not in "aeiou" for x in a.lower())
without_vowels s "".join(x for x in a if x.lower() not in "aeiou")
letters s "".join(x for x in a if x.isalpha())
digits s "".join(x for x in a if x.isdigit())
digits_total s sum(int(x) for x in a if x.isdigit())
word_count s len(a.split())
words s a.split()
longest_word s max(a.split(), key=len)
reversed_words s " ".join(a.split()[::-1])
capitals s sum(x.isupper() for x in a)
initials s "".join(x[0] for x in a.split())
first_char s a[0]
last_char s a[-1]
middle_char s a[len(a) // 2]
char_counts s {x: a.count(x) for x in a}
distinct_chars s len(set(a))
all_distinct s len(set(a)) == len(a)
first_repeated s next(x for i, x in enumerate(a) if x in a[:i])
first_unique s next(x for x in a if a.count(x) == 1)
sorted_chars s "".join(sorted(a))
compressed s [(x, a.count(x)) for i, x in enumerate(a) if x not in a[:i]]
caesar si "".join(chr((ord(x) - 97 + b) % 26 + 97) if x.islower() else x for x in a)
repeated si a * b
prefix si a[:b]
suffix si a[-b:]
padded si a.rjust(b + 5, "0")
nth si a[b]
every_nth si a[:: abs(b)]
count_char ss a.count(b)
starts ss a.startswith(b)
ends ss a.endswith(b)
has ss b in a
find ss a.find(b)
replaced ss a.replace(b, "-")
concatenated ss a + " " + b
is_anagram ss sorted(a) == sorted(b)
common_chars ss "".join(sorted(set(a) & set(b)))
hamming ss sum(x != y for x, y in zip(a, b)) + abs(len(a) - len(b))
is_longer ss len(a) > len(b)
common_prefix ss a[: next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))]
trimmed s a.strip("a")
no_spaces s a.replace(" ", "")
ascii_total s sum(ord(x) for x in a)
doubled_chars s "".join(x * 2 for x in a)
is_identifier s a.isidentifier()
substrings s len({a[i:j] for i in range(len(a)) for j in range(i + 1, len(a) + 1)})
rotations s [a[i:] + a[:i] for i in range(len(a))]
lengths w [len(x) for x in a]
shortest w min(a, key=len)
longest w max(a, key=len)
by_length w sorted(a, key=len)
alphabetical w sorted(a)
sentence w " ".join(a)
uppered w [x.upper() for x in a]
short_ones w [x for x in a if len(x) < 4]
starting_with_a w [x for x in a if x.lower().startswith("a")]
word_index w {x: i for i, x in enumerate(a)}
grouped w {str(n): [x for x in a if len(x) == n] for n in sorted({len(x) for x in a})}
total_length w sum(len(x) for x in a)
counted w sorted({(x, a.count(x)) for x in a})
longer_than wi [x for x in a if len(x) > b]
acronym w "".join(x[0].upper() for x in a)
transposed m [list(x) for x in zip(*a)]
flat m [x for r in a for x in r]
row_sums m [sum(r) for r in a]
column_sums m [sum(c) for c in zip(*a)]
trace m sum(a[i][i] for i in range(len(a)))
anti_trace m sum(a[i][-1 - i] for i in range(len(a)))
largest_entry m max(x for r in a for x in r)
is_symmetric m all(a[i][j] == a[j][i] for i in range(len(a)) for j in range(len(a)))
scaled mi [[x * b for x in r] for r in a]
matrix_sum mm [[x + y for x, y in zip(r, s)] for r, s in zip(a, b)]
turned m [list(x)[::-1] for x in zip(*a)]
mirrored m [r[::-1] for r in a]
upper_triangle m [[x if j >= i else 0 for j, x in enumerate(r)] for i, r in enumerate(a)]
count_zeros m sum(x == 0 for r in a for x in r)
border m [x for i, r in enumerate(a) for j, x in enumerate(r) if i in (0, len(a) - 1) or j in (0, len(r) - 1)]
keys_of d sorted(a)
values_of d sorted(a.values())
values_total d sum(a.values())
inverted d {str(v): k for k, v in sorted(a.items())}
best_key d max(sorted(a), key=lambda k: a[k])
positive_items d {k: v for k, v in a.items() if v > 0}
incremented d {k: v + 1 for k, v in a.items()}
items_by_value d sorted(a.items(), key=lambda x: (x[1], x[0]))
combined dd {k: a.get(k, 0) + b.get(k, 0) for k in sorted({*a, *b})}
has_key ds b in a
"""


@dataclass(frozen=True)
class Program:
    """A reference program: its text, and its calls with what plain Python says comes of them."""

    name: str
    text: str
    calls: tuple[tuple[tuple[Any, ...], Any], ...]

    def mutants(self) -> Iterator[str]:
        """Texts that differ in one operator, number or name, and in the result of a call."""
        tree = ast.parse(self.text)
        for place, node in enumerate(ast.walk(tree)):
            for change in _changes(node):
                other = copy.deepcopy(tree)
                change(list(ast.walk(other))[place])
                text = ast.unparse(other)
                if any(_try(text, self.name, args) != wanted for args, wanted in self.calls):
                    yield text


_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.FloorDiv,
    ast.Mod: ast.FloorDiv, ast.Lt: ast.GtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitXor, ast.BitXor: ast.BitAnd,
}  # fmt: skip

_NAMES = {
    "max": "min", "min": "max", "sum": "len", "len": "sum", "all": "any", "any": "all", "sorted": "list", "set": "list",
    "zip": "list", "str": "repr", "upper": "lower", "lower": "upper", "title": "upper", "swapcase": "upper",
    "isalpha": "isdigit", "isdigit": "isalpha", "isupper": "islower", "split": "strip", "count": "find",
    "index": "count", "items": "keys", "values": "keys", "startswith": "endswith", "endswith": "startswith",
    "a": "b", "b": "a",
}  # fmt: skip


def _changes(node: ast.AST) -> Iterator[Any]:
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in _OPERATORS:
        yield lambda n: setattr(n, "op", _OPERATORS[type(n.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _OPERATORS:
        yield lambda n: n.ops.__setitem__(0, _OPERATORS[type(n.ops[0])]())
    elif isinstance(node, ast.Constant) and type(node.value) is int and node.value < 20:
        yield lambda n: setattr(n, "value", n.value + 1)
    elif isinstance(node, ast.Name) and node.id in _NAMES:
        yield lambda n: setattr(n, "id", _NAMES[n.id])
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
        yield lambda n: setattr(n, "attr", _NAMES[n.attr])
    elif isinstance(node, ast.UnaryOp):
        yield lambda n: setattr(n, "op", ast.UAdd())
    elif isinstance(node, ast.Return):
        yield lambda n: setattr(n, "value", ast.Name("a"))


def _try(text: str, name: str, args: tuple[Any, ...]) -> Any:
    space: dict[str, Any] = {}
    try:
        exec(text, space)
        return space[name](*copy.deepcopy(args))
    except Exception as error:
        return error


def programs() -> list[Program]:
    """All of them, each with two to five calls that do not raise."""
    made = []
    for line in FUNCTIONS.strip().split("\n"):
        name, kinds, body = line.split(" ", 2)
        text = f"def {name}({', '.join('abc'[: len(kinds)])}):\n    return {body}\n"
        calls = []
        for i in range(7):
            args = tuple(INPUTS[kind][(i + place) % len(INPUTS[kind])] for place, kind in enumerate(kinds))
            result = _try(text, name, args)
            if not isinstance(result, Exception) and (args, result) not in calls:
                calls.append((args, result))
        made.append(Program(name, text, tuple(calls[:5])))
    return made
