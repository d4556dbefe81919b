"""Words that may follow a number: units, which are compared only with other units, and words that change the number.

``18 eggs`` is 18. ``18 million``, ``18 or twenty`` and ``18 squared`` are not, and neither is ``18 m`` for ``18 cm``.
"""

from __future__ import annotations

import re

# One line for each unit: its names. A name of one letter, or one that is a common word, counts in \text{} alone.
_NAMES = """
degree degrees deg
radian radians rad
dollar dollars usd
cent cents
euro euros eur
pound pounds lb lbs
percent pct percentage
mm millimeter millimeters millimetre millimetres
cm centimeter centimeters centimetre centimetres
m meter meters metre metres
km kilometer kilometers kilometre kilometres
nm
inch inches in
foot feet ft
yard yards yd
mile miles mi
mph
kmh kph
kg kilogram kilograms
g gram grams
mg
ton tons
ounce ounces oz
l liter liters litre litres
ml
gallon gallons
s sec second seconds
min minute minutes
h hr hrs hour hours
day days
week weeks
month months
year years
unit units
point points
way ways
people person
student students
digit digits
integer integers
number numbers
pair pairs
time times
"""
CANONICAL = {name: line.split()[0] for line in _NAMES.strip().splitlines() for name in line.split()}
MODIFIERS = frozenset({"square", "cubic", "sq", "cu", "per"})
_ONLY_IN_TEXT = frozenset({"m", "g", "l", "s", "h", "in", "rad", "number", "person", "mi", "cu"})
UNITS = (CANONICAL.keys() | MODIFIERS) - _ONLY_IN_TEXT

MULTIPLES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # powers of ten
_OTHER_NUMBERS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety k bn mn mil mio tn hundreds thousands millions billions
trillions dozen dozens half halves third thirds quarter quarters fifth tenth tenths hundredth hundredths thousandth
thousandths pi squared cubed factorial root sqrt base or and not nor no plus minus times over divided mod modulo to than
more less least most wrong incorrect false
"""
# Words that make another number of the one before them, with or without further text.
MULTIPLIERS = (*MULTIPLES, "hundreds", "thousands", "millions", "billions", "trillions", "dozen", "dozens")
MULTIPLIERS += ("k", "bn", "mn", "mil", "mio", "tn", "squared", "cubed", "factorial", "halves", "thirds", "quarters")
NOT_UNITS = frozenset(MULTIPLES) | frozenset(_OTHER_NUMBERS.split())
_WORD = re.compile(r"[^\W\d_]+")
_CHANGES = re.compile(r"[+=<>^~|\\{}\u00d7\u00f7\u221a\u00b1\u03c0]|/(?!\s?[^\W\d_])")


def changes(rest: str) -> bool:
    """Returns whether the text after a number makes it another number, or no number.

    >>> [changes(rest) for rest in ("", ".", " eggs", "%", " km/h", "cm", "**", " (in all)", " a day")]
    [False, False, False, False, False, False, False, False, False]
    >>> [changes(rest) for rest in (" or 19", " million", "k", "x", " = x", "\\u00bd", " and a half", "^x", "/y")]
    [True, True, True, True, True, True, True, True, True]
    """
    if any(char.isnumeric() for char in rest) or _CHANGES.search(rest):
        return True
    words = _WORD.findall(rest.lower())
    return any(word in NOT_UNITS or (len(word) == 1 and word not in CANONICAL and word != "a") for word in words)
