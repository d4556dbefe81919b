r"""The tokens of a mathematical answer: LaTeX, plain text and Unicode in one alphabet, and nothing thrown away.

Spaces are no tokens, but each token knows what stood before it, because ``5 6`` is not 56, ``1, 234`` is a list and
``1,234`` and ``1\,234`` are numbers. Row ends of matrices are tokens of their own.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal, NamedTuple

from hybridflow.rewards.verifiable.text import plain

Kind = Literal["number", "letters", "command", "text", "begin", "end", "symbol"]
MOST_DIGITS = 1000  # of a number, and of a repeating decimal


class Token(NamedTuple):
    """A token: its text (of ``\\text{cm}`` the "cm"), and the space before it: "", "thin" or "wide"."""

    kind: Kind
    text: str
    space: str = ""


def _fractions() -> dict[str, str]:
    parts = {0xBC: (1, 4), 0xBD: (1, 2), 0xBE: (3, 4), 0x2150: (1, 7), 0x2151: (1, 9), 0x2152: (1, 10)}
    eighths = [(1, 3), (2, 3), (1, 5), (2, 5), (3, 5), (4, 5), (1, 6), (5, 6), (1, 8), (3, 8), (5, 8), (7, 8)]
    parts |= {0x2153 + i: part for i, part in enumerate(eighths)}
    return {chr(code): f"\\frac{{{above}}}{{{below}}}" for code, (above, below) in parts.items()}


_GREEK = """
alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma_ sigma tau upsilon phi chi
psi omega
""".split()  # noqa: SIM905
_SYMBOLS = (
    _fractions()
    | {chr(0x3B1 + i): f"\\{name.strip('_')} " for i, name in enumerate(_GREEK)}
    | {
        "\u03d5": "\\phi ", "\u221a": "\\usqrt ", "\u221b": "\\sqrt[3]", "\u221e": "\\infty ", "\u00d7": "\\times ",
        "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u2219": "\\cdot ", "\u00f7": "\\div ", "\u2044": "/", "\u2215": "/",
        "\u2264": "\\le ", "\u2265": "\\ge ", "\u2a7d": "\\le ", "\u2a7e": "\\ge ", "\u2260": "\\ne ",
        "\u2248": "\\approx ", "\u00b1": "\\pm ", "\u2213": "\\mp ", "\u00b0": "\\degree ", "\u00ba": "\\degree ",
        "\u222a": "\\cup ", "\u2229": "\\cap ", "\u2208": "\\in ", "\u2205": "\\emptyset ", "\u2216": "\\setminus ",
        "\u211d": "\\mathbb{R}", "\u2124": "\\mathbb{Z}", "\u2115": "\\mathbb{N}", "\u211a": "\\mathbb{Q}",
        "\u2102": "\\mathbb{C}", "\u27e8": "\\langle ", "\u27e9": "\\rangle ", "\u2032": "'", "\u2019": "'",
        "\u20ac": "\\euro ", "\u00a3": "\\pounds ", "\u2220": "\\angle ", "\u25b3": "\\triangle ",
        "\u230a": "\\lfloor ", "\u230b": "\\rfloor ", "\u2308": "\\lceil ", "\u2309": "\\rceil ", "\u2261": "\\equiv ",
        "\u2026": "\\dots ", "\u22ef": "\\dots ", "\u2227": "\\land ",
    }
)  # fmt: skip
_UNICODE = str.maketrans(_SYMBOLS)
_THIN = {0x2009: "\\,", 0x202F: "\\,"}  # which `plain` takes for a space
_RAISED, _LOWERED = (
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207d\u207e\u207f\u2071",
    ("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089\u208a\u208b\u208d\u208e\u2099\u1d62"),
)
_ON_THE_LINE = str.maketrans(_RAISED + _LOWERED, "0123456789+-()ni" * 2)
_SCRIPTS = (re.compile(f"[{_RAISED}]+"), "^"), (re.compile(f"[{_LOWERED}]+"), "_")

_SIZES = re.compile(
    r"\\(?:left|right|middle|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|Biggl?|Biggr)(?![a-zA-Z])[ \t]*\.?(?![0-9])"
    r"|\\(?:displaystyle|textstyle|limits|nolimits|mathstrut|strut|hfill|bf|rm|it)(?![a-zA-Z])"
    r"|\\(?:phantom|hspace|vspace|label|tag)\*?\s*\{[^{}]*\}|\\boxed(?=\s*\{)"
)
_AROUND = " \t\r\n*`$"  # bold, code, formula
_SPACE_AT_THE_END = re.compile(r"(?<!\\)\\$")  # what is left of a space that was escaped
_COMMA = re.compile(r"\{\s*,\s*\}|\\!\s*,|,\s*\\!")
_TIMES_TEN = re.compile(r"(?<=[0-9.])(\s*)[xX](?=\s*10\s*\^)")
_REPEATING = re.compile(
    r"(?<![0-9.,])([0-9]*)\.(?:([0-9]*)\\(?:overline|bar|dot)\s*(?:\{([0-9]+)\}|([0-9]))|\(([0-9]+)\))(?![0-9])"
)
_BASES = "two three four five six seven eight nine ten eleven twelve sixteen".split()  # noqa: SIM905
_BASE_NAMES = {name: str(value) for name, value in zip(_BASES, [*range(2, 13), 16])}
_BASE = rf"([0-9]{{1,2}}|{'|'.join(_BASES)})"
_BASE_AFTER = re.compile(
    rf"\s*(?:\\text\{{)?\s*,?\s*\(?\s*(?:in\s+)?base[\s-]*(?:\\text\{{|\}}|_)?\s*{_BASE}\s*\)?\s*\}}?$", re.IGNORECASE
)
_DIGITS = r"(?:[0-9][0-9A-F]*|[A-F][0-9A-F]+)(?:\.[0-9A-F]+)?"
_DIGITS_OF_BASE = re.compile(
    rf"(?<![A-Za-z\\0-9.])(?<!(?<!\\),)(?:\(({_DIGITS})\)|({_DIGITS}))\s*_\s*"
    rf"(?:\{{\s*\(?(?:\\text\{{)?\s*(?:base\s+)?{_BASE}\s*\}}?\)?\s*\}}|([0-9]{{1,2}}))(?![0-9])"
)
_TEXT = r"text(?:bf|it|rm|sf|tt|normal)?|mbox|mathrm|mathbf|mathit|mathsf|mathtt|boldsymbol|bm|operatorname\*?|fbox"
_NO_WORDS = re.compile(r"[,;()=0-9]|\S\s+(?:and|or)\s+\S")
_TOKEN = re.compile(
    r"\\begin\s*\{(?P<begin>[a-zA-Z]+)\*?\}(?P<columns>\s*(?:\[[a-z]\])?\s*\{[lcr|\s]*\})?"
    r"|\\end\s*\{(?P<end>[a-zA-Z]+)\*?\}"
    r"|(?P<row>\\\\(?:\s*\[\s*-?[0-9.]+\s*(?:pt|em|ex|mm|cm|in)\s*\])?|\\cr(?![a-zA-Z]))"
    r"|(?P<thin>\\[,!]|\{\s*\}|\\thinspace(?![a-zA-Z]))"
    r"|(?P<wide>\\[;:> \n]|~|\s+|\\q?quad(?![a-zA-Z])|\\hline(?![a-zA-Z]))"
    r"|(?P<delimiter>\$|\\[()\[\]])"
    rf"|\\(?:{_TEXT})\s*\{{(?P<text>[^{{}}]*)\}}"
    r"|(?P<command>\\[a-zA-Z]+)"
    r"|(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?P<exponent>[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z.]))?"
    r"|(?P<letters>[A-Za-z]+)"
    r"|(?P<symbol>\\[^a-zA-Z]|\{,\}|<=|>=|!=|.)",
    re.DOTALL,
)


def tokens(text: str) -> list[Token]:
    r"""Returns all tokens of a text.

    >>> [token.text for token in tokens(r"$\left(\dfrac12, \ 3\text{ cm}\right)$.")]
    ['(', '\\frac', '12', ',', '3', 'cm', ')']
    >>> [token.text for token in tokens("\u00bd\u221a3 x\u00b2")]
    ['\\frac', '{', '1', '}', '{', '2', '}', '\\usqrt', '3', 'x', '^', '{', '2', '}']
    >>> [token.text for token in tokens(r"1 & 2 \\ 3")], [token.text for token in tokens("1010 base two")]
    (['1', '&', '2', '\\\\', '3'], ['\\base', '{', '1010', '}', '{', '2', '}'])
    """
    found: list[Token] = []
    space = ""
    for match in _TOKEN.finditer(_rewritten(text)):
        kind, said = match.lastgroup, match[0]
        if kind in ("thin", "wide", "delimiter") or (match["text"] is not None and not match["text"].strip()):
            space = "wide" if kind == "wide" or space == "wide" else space or ("thin" if kind == "thin" else "wide")
            continue
        if match["text"] is not None and _NO_WORDS.search(match["text"]):
            inside = tokens(match["text"])  # \\text{A, C} and \\text{(C)}
            found += [inside[0]._replace(space=space), *inside[1:]] if inside else []
        else:
            found.append(_token(match, said, space))
        space = ""
    return found


def _token(match: re.Match[str], said: str, space: str) -> Token:
    if match["begin"]:
        return Token("begin", match["begin"] + ("" if match["columns"] is None else " with columns"), space)
    if match["end"]:
        return Token("end", match["end"], space)
    if match["row"]:
        return Token("symbol", "\\\\", space)
    if match["text"] is not None:
        return Token("text", " ".join(match["text"].split()), space)
    if match["command"]:
        said = _COMMANDS.get(said, said)
        return Token("command" if said[1:].isalpha() else "symbol", said, space)
    if match["number"]:
        return Token("number", said, space)
    return Token("letters" if match["letters"] else "symbol", said, space)


_COMMANDS = {
    "\\dfrac": "\\frac",
    "\\tfrac": "\\frac",
    "\\cfrac": "\\frac",
    "\\dbinom": "\\binom",
    "\\tbinom": "\\binom",
}
_COMMANDS |= {"\\leq": "\\le", "\\geq": "\\ge", "\\leqslant": "\\le", "\\geqslant": "\\ge", "\\neq": "\\ne"}
_COMMANDS |= {"\\lt": "<", "\\gt": ">", "\\lbrace": "\\{", "\\rbrace": "\\}", "\\ldots": "\\dots", "\\cdots": "\\dots"}
_COMMANDS |= {"\\ast": "*", "\\colon": ":", "\\varnothing": "\\emptyset", "\\lbrack": "[", "\\rbrack": "]"}
_COMMANDS |= {"\\lvert": "|", "\\rvert": "|", "\\vert": "|", "\\backslash": "\\setminus", "\\degrees": "\\degree"}


def _rewritten(text: str) -> str:
    """Returns the text with everything that is not LaTeX written as LaTeX."""
    if not text.isascii():
        text = text.translate(_THIN)
        for pattern, sign in _SCRIPTS:
            text = pattern.sub(lambda run, sign=sign: f"{sign}{{{run[0].translate(_ON_THE_LINE)}}}", text)  # type: ignore[misc]
        text = plain(text).translate(_UNICODE)
    text = _SIZES.sub(" ", text).strip(_AROUND).removesuffix(".").strip(_AROUND)
    text = _COMMA.sub("{,}", _SPACE_AT_THE_END.sub("", text))
    text = _TIMES_TEN.sub(r"\1\\times ", text)
    text = _REPEATING.sub(_repeating, text)
    after = _BASE_AFTER.search(text, max(0, len(text) - 40))
    if after is not None and after.start() > 0:
        text = f"{text[: after.start()]}_{{{after[1]}}}"
    return _DIGITS_OF_BASE.sub(_based, text)


def _based(found: re.Match[str]) -> str:
    """Rewrites digits with their base; A_1 is a name."""
    digits, name = found[1] or found[2], (found[3] or found[4]).lower()
    base = int(_BASE_NAMES.get(name, name))
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits.replace(".", "")):
        return found[0]
    return f"\\base{{{digits}}}{{{base}}}"


def _repeating(found: re.Match[str]) -> str:
    """Returns a repeating decimal as a quotient."""
    whole, fixed, period = found[1] or "0", found[2] or "", found[3] or found[4] or found[5]
    if len(whole + fixed + period) > MOST_DIGITS:
        return found[0]
    nines = 10 ** len(period) - 1
    value = Fraction(int(whole + fixed) * nines + int(period), nines * 10 ** len(fixed))
    return f"{{\\frac{{{value.numerator}}}{{{value.denominator}}}}}"


def commas_part_thousands(found: list[Token], in_brackets: bool) -> bool:
    """Returns whether ``1,234`` in a sequence that begins here is one number: in brackets, only where other commas have
    spaces.

    >>> [commas_part_thousands(tokens(text), False) for text in ("1,234", "1,2", "1,234, 5", "1, 234")]
    [True, False, True, True]
    >>> [commas_part_thousands(tokens(text), True) for text in ("1,234)", "1,234, 5)")]
    [False, True]
    """
    if not any(token.text == "," for token in found):
        return False
    depth, spaced = 0, False
    runs: list[list[str]] = [[]]
    for before, token, after in zip([_NONE, *found], found, [*found[1:], _NONE]):
        depth += (token.text in _OPENING) - (token.text in _CLOSING)
        if depth < 0:
            break
        if depth:
            runs.append([])
        elif token.kind == "number":
            runs[-1:] = [[*runs[-1], token.text]]
        elif token.text == "," and before.kind == after.kind == "number" and not token.space + after.space:
            continue
        else:
            spaced = spaced or (token.text == "," and after.space == "wide")
            runs.append([])
    return (spaced or not in_brackets) and all(_is_thousands(*run) for run in runs if len(run) > 1)


def _is_thousands(first: str, *groups: str) -> bool:
    return (
        (len(first) <= 3 and first.isdigit() and first[0] != "0")
        and all(len(group.partition(".")[0]) == 3 for group in groups)
        and all(group.isdigit() for group in groups[:-1])
    )


_NONE = Token("symbol", "")
_OPENING, _CLOSING = frozenset({"(", "[", "{", "\\{"}), frozenset({")", "]", "}", "\\}"})
