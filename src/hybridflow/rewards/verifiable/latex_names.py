"""The words of LaTeX that answers are written with: which are functions, names, relations, brackets, matrices."""

from __future__ import annotations

FUNCTIONS = frozenset(
    """
    sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh ln log lg exp gcd lcm max min det arg Re Im
    """.split()  # noqa: SIM905
)
TRIGONOMETRIC = frozenset({"sin", "cos", "tan", "cot", "sec", "csc"})
PLAIN_WORDS = {"sqrt": "\\usqrt", "pi": "\\pi", "infinity": "\\infty", "infty": "\\infty", "oo": "\\infty"}
PLAIN_WORDS |= {name: f"\\{name}" for name in ("theta", "alpha", "beta", "gamma", "lambda", "in", "mod")}
CONSTANTS = {"\\pi": "pi", "\\infty": "oo", "\\emptyset": "empty"}
GREEK = frozenset(
    """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma tau
    upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell
    """.split()  # noqa: SIM905
)
ACCENTS = frozenset(
    {"vec", "hat", "bar", "overline", "tilde", "overrightarrow", "widehat", "widetilde", "dot", "ddot", "underline"}
)
RELATIONS = {"=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "\\le": "<=", "\\ge": ">="}
RELATIONS |= {"\\ne": "!=", "\\in": "in", "\\approx": "~", "\\equiv": "congruent"}
JOINS = {"\\cup": "union", "\\cap": "intersection", "\\setminus": "setminus"}
MATRICES = frozenset({"matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array", "vmatrix"})
CLOSING = {"(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}",), "\\langle": ("\\rangle",)}
PAIRED = {"\\lfloor": ("\\rfloor", "floor"), "\\lceil": ("\\rceil", "ceiling"), "\\|": ("\\|", "norm")}
CURRENCIES = {"\\$": "dollar", "\\euro": "euro", "\\pounds": "pounds"}
STARTING = (  # commands that begin a factor
    GREEK | ACCENTS | FUNCTIONS | {"frac", "binom", "sqrt", "usqrt", "base", "pi", "infty", "lfloor", "lceil", "langle"}
) | {"mathbb", "angle", "triangle"}
ENDS = frozenset([",", "{,}", ";", ")", "]", "}", "\\}", "|", "=", "<", ">", "<=", ">=", "\\le", "\\ge", "&", "\\\\"])
_UNITS_OF_ONE_LETTER = frozenset("mgshlLNJWV")


def name_in_text(said: str) -> str | None:
    r"""Returns what ``\mathrm{e}``, ``\mathbf{x}`` or ``\operatorname{arctan}`` names; None for words and units."""
    is_letter = len(said) == 1 and said.isalpha() and said not in _UNITS_OF_ONE_LETTER
    return said if said in FUNCTIONS or is_letter else None
