"""Finds files and functions that a configuration names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybridflow.config.imports import import_file
from hybridflow.errors import UserError, nearest

_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")


def locate(reference: str, base: Path) -> str:
    """Returns a path or ``file.py:function`` as seen from the current folder; a path that does not exist is looked up
    in `base`.

    Names at other places (``modelscope://org/name``) are left as they are.
    """
    if "://" in reference:
        return reference
    file, colon, name = reference.rpartition(":") if is_function_reference(reference) else (reference, "", "")
    path = Path(file)
    if not path.is_absolute() and not path.exists() and (base / path).exists():
        return f"{base / path}{colon}{name}"
    return reference


def expanded(text: str) -> str:
    """Returns a path with ``~``, ``~user``, ``$VARIABLE`` and ``${VARIABLE}`` filled in; ``scheme://...`` is left as it
    is.

    A file whose name holds a dollar sign keeps it where the variable is not set.

    Raises:
        ValueError: a variable is not set, or there is no such user; else a folder of that literal name would be made.
    """
    if "://" in text:
        return text
    missing = [a or b for a, b in _VARIABLE.findall(text) if (a or b) not in os.environ]
    if missing and not os.path.lexists(text):
        raise ValueError(f"{text!r} has the variable ${missing[0]}, which is not set")
    filled = _VARIABLE.sub(lambda found: os.environ.get(found[1] or found[2], found[0]), text)
    path = os.path.expanduser(filled)
    if path.startswith("~") and not os.path.lexists(path):
        raise ValueError(f"{text!r} begins with ~, and there is no such user; write ./{text} for a name that does")
    return path


def is_function_reference(text: str) -> bool:
    """Returns whether a text names a function in a file: ``file.py:function``."""
    return ".py:" in text


def load_function(reference: str) -> Callable[..., Any]:
    """Loads the function that ``file.py:function`` names. The file is imported once per process: see `imports`.

    Raises:
        UserError: no such file, the file raises when imported, or it has no such function.
    """
    file, _, name = reference.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(
            f"no file {file} (for {reference})", fix="give file.py:function, relative to the current folder"
        )
    module = import_file(path.resolve(), reference)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UserError(f"{file} has no function {name!r}", fix=nearest(name, known))
    return function
