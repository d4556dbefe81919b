"""The one exception type for mistakes that a user can mend."""

from __future__ import annotations

import difflib
import linecache
import os
import shlex
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

LISTED = 40  # names in a message


class UserError(Exception):
    """A mistake in what the user gave us: says what is wrong, why it matters, and how to mend it.

    The command line prints it without a traceback. Broken invariants of our own are assertions instead.
    """

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__("\n".join(filter(None, [what, why and f"  why: {why}", fix and f"  fix: {fix}"])))


def near(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that is most like this one; None where none is much like it."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return close[0] if close else None


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the hint that follows an unknown name: the nearest known one, or the list of all (of the first of very
    many).

    >>> nearest("temprature", ["temperature", "top_p"])
    "did you mean 'temperature'?"
    """
    known = sorted(known)
    meant = near(name, known)
    if meant is not None:
        return f"did you mean '{meant}'?"
    more = f", and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return f"known: {', '.join(known[:LISTED])}{more}" if known else "there are none"


def raised(error: BaseException, text: str | None = None) -> str:
    """Describes what code of the user's raised, in one line that ends with where it did: file, line, function and code.

    Of the calls that led to the error it is the last one in a file that is neither Python's, nor an installed
    package's, nor ours: where only a library notices a mistake, the line shows the user's call that made it.

    Args:
        error: the exception.
        text: the error's own words; None takes them from the error.
    """
    said = " ".join((str(error) if text is None else text).split())
    place = _place(error)
    return type(error).__name__ + (f": {said}" if said else "") + (f" ({place})" if place else "")


def _place(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        code = (error.text or linecache.getline(error.filename, error.lineno)).strip()
        return f"{error.filename}, line {error.lineno}: {code}" if code else f"{error.filename}, line {error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_OURS, "<frozen "))]
    theirs = [
        f for f in frames if not f.filename.startswith(_STDLIB) and not _PACKAGES.intersection(Path(f.filename).parts)
    ]
    if not frames:
        return ""
    last = theirs[-1] if theirs else frames[0]
    return f"{last.filename}, line {last.lineno}, in {last.name}: {(last.line or '').strip()}".removesuffix(": ")


_OURS, _STDLIB = (folder + os.sep for folder in (os.path.dirname(__file__), sysconfig.get_paths()["stdlib"]))
_PACKAGES = {"site-packages", "dist-packages"}


def typed(*words: object) -> str:
    """Returns a command of ours as it is to be typed: what the shell would split is quoted.

    >>> typed("check", "my runs/a.yaml")
    "hybridflow check 'my runs/a.yaml'"
    """
    return shlex.join(["hybridflow", *map(str, words)])
