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
from hybridflow.errors import UserError, near


def path(text: str) -> str:
    """Returns a path argument with ``~`` and variables filled in."""
    try:
        return str(home(text)) if text.startswith("~") or "$" in text else text
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _Suggesting(argparse.ArgumentParser):
    """A parser that names the nearest choice where a word is none of them."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = [str(choice) for choice in action.choices or ()]
        meant = None if value in choices else near(str(value), choices)
        if meant is not None:
            text = f"invalid choice: {value!r}; did you mean {meant!r}?"
            raise argparse.ArgumentError(action, f"{text} (choose from {', '.join(map(repr, choices))})")
        super()._check_value(action, value)


class Program(_Suggesting):
    """The command itself: its options, and the names of its commands."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reads the words; one that begins with a dash and is no option is reported before a command is missed."""
        first = next(iter(args or ()), "")
        known = [option for action in self._actions for option in action.option_strings]
        if first.startswith("-") and not any(option.startswith(first) for option in known):
            self.error(f"there is no option {first}; {_hint(first, known)}")
        return super().parse_known_args(args, namespace)


class Parser(_Suggesting):
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
        if not takes_overrides or (meaning(option) is None and _nearest_option(option, known)):
            self.error(f"{text}; {_hint(option, known)}")
        name, sign, value = option.lstrip("-").partition("=")
        if not sign:
            after = self.words[self.words.index(option) + 1 :][:1] if option in self.words else []
            value = after[0] if after and not after[0].startswith("-") and "=" not in after[0] else "VALUE"
        found = meaning(name)
        key = found.keys[0] if found is not None and found.keys else name.replace("-", "_")
        self.error(f"{text}; keys of the configuration are given as key=value, without dashes: {key}={value}")


def _nearest_option(option: str, known: Sequence[str]) -> str | None:
    """Returns the option that is most like this one, both without their dashes; None where none is much like it.

    >>> _nearest_option("--versoin", ["-h", "--help", "--version"])
    '--version'
    """
    name = option.partition("=")[0].lstrip("-").replace("_", "-")
    meant = near(name, [o.removeprefix("--") for o in known if o.startswith("--")])
    return None if meant is None else f"--{meant}"


def _hint(option: str, known: Sequence[str]) -> str:
    meant = _nearest_option(option, known)
    return f"options are {', '.join(known)}" if meant is None else f"did you mean {meant}?"


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
