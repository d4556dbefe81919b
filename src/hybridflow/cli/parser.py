"""Reads a command line and ends its output: options and overrides in any order, paths with ``~``, pipes."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from hybridflow.config.names import meaning
from hybridflow.config.paths import home
from hybridflow.errors import UserError


def path(text: str) -> str:
    """Returns a path argument with ``~`` and variables filled in."""
    try:
        return str(home(text)) if text.startswith("~") or "$" in text else text
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Parser(argparse.ArgumentParser):
    """A command's arguments; options may come before, between and after the others."""

    _within = False
    words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reads overrides before and after options; argparse alone ends their list at the first option."""
        if self._within:
            return super().parse_known_args(args, namespace)
        self._within, self.words = True, list(args or ())
        try:
            given, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._within = False
        if unknown:
            self._refuse(unknown[0], takes_overrides=hasattr(given, "overrides"))
        return given, unknown

    def _refuse(self, option: str, *, takes_overrides: bool) -> NoReturn:
        """Exits for a word that no argument takes; keys of a configuration have no dashes."""
        if not option.startswith("-"):
            self.error(f"one argument too many: {option}")
        known = [o for action in self._actions for o in action.option_strings if o.startswith("--")]
        text = f"there is no option {option.partition('=')[0]}"
        if not takes_overrides:
            self.error(f"{text}; options are {', '.join(known)}")
        name, sign, value = option.lstrip("-").partition("=")
        if not sign:
            after = self.words[self.words.index(option) + 1 :][:1] if option in self.words else []
            value = after[0] if after and not after[0].startswith("-") and "=" not in after[0] else "VALUE"
        found = meaning(name)
        key = found.keys[0] if found is not None and found.keys else name.replace("-", "_")
        self.error(f"{text}; keys of the configuration are given as key=value, without dashes: {key}={value}")


def never_fails_to_print() -> None:
    """Writes a character that the terminal cannot show as an escape, so that printing never raises."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def reader_is_gone() -> int:
    """Returns the status of a command whose output is no longer read (``| head``): the one that the signal would have
    given.

    Drops the rest of the output, so that the interpreter does not report an error at its end.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
