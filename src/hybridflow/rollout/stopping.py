"""Ends of responses that their text decides: stop strings and regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

CUT = "\ufffd"  # what decoders write for bytes of a character that is not complete yet


class StopText:
    """Reads a response as it grows and finds the first token whose text completes a stop.

    Only the newest tokens are decoded each time, after a few old ones: some decoders write a token differently at the
    beginning of a text. A stop may span any number of tokens, and tokens may end within a character.

    Args:
        stop: texts that end the response.
        regex: a regular expression that ends the response where it matches, searched in all of the text; None for none.
        decode: token ids to text.
        token_ids: tokens of the response that are there already.
    """

    def __init__(
        self, stop: Sequence[str], regex: str | None, decode: Callable[[list[int]], str], token_ids: Sequence[int] = ()
    ) -> None:
        self.stop, self.regex, self.decode = stop, None if regex is None else re.compile(regex), decode
        self.tokens = list(token_ids)
        self.text = decode(self.tokens) if self.tokens else ""  # what is certain, up to token `read`
        self.begin, self.read = max(0, len(self.tokens) - 4), len(self.tokens)  # `begin`: where decoding starts
        self.longest = max(map(len, stop), default=0)

    def ends_with(self, token: int) -> bool:
        """Adds a token; returns whether a stop is complete with it."""
        self.tokens.append(token)
        known = self.decode(self.tokens[self.begin : self.read])
        new = self.decode(self.tokens[self.begin :])[len(known) :]
        text = self.text + new.rstrip(CUT)
        tail = text[max(0, len(text) - len(new) - self.longest) :]
        found = any(s in tail for s in self.stop) or (self.regex is not None and self.regex.search(text) is not None)
        if new and not new.endswith(CUT):
            self.text, self.begin, self.read = text, self.read, len(self.tokens)
        return found
