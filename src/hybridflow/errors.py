"""The one exception type for mistakes that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave us: says what is wrong, why it matters, and how to mend it.

    The command line prints it without a traceback. Broken invariants of our own are assertions instead.
    """

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__("\n".join(filter(None, [what, why and f"  why: {why}", fix and f"  fix: {fix}"])))


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint that follows an unknown name: the nearest known one, or the list of all.

    >>> nearest("temprature", ["temperature", "top_p"])
    "did you mean 'temperature'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
