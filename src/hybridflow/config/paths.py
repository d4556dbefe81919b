"""Keys that name files and folders: one rule for all of them.

``~`` and ``$VARIABLE`` are filled in. A path that a run reads is looked up in the current folder, then beside the YAML
file (the validation context's ``base``); a path that it writes is used as it is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from hybridflow.config.locate import expanded, is_function_reference, locate
from hybridflow.errors import UserError


def _text(value: Any) -> Any:
    if callable(value) or hasattr(value, "state_dict"):
        name = getattr(value, "__name__", type(value).__name__)
        raise ValueError(
            f"a configuration is text, and this is {name} in memory: write the function into a file and name it, as "
            f"file.py:{name if str(name).isidentifier() else 'function'}"
        )
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _read(text: str, info: ValidationInfo) -> str:
    base = (info.context or {}).get("base")
    return _written(text) if base is None else locate(_written(text), base)


def _written(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty, and names nothing")
    return expanded(text)


def _named(text: str, info: ValidationInfo) -> str:
    return _read(text, info) if is_function_reference(text) else text


PATHS = (AfterValidator(_read), AfterValidator(_written))  # by which a path key is known
ReadPath = Annotated[str, BeforeValidator(_text), PATHS[0]]
"""A file or folder that a run reads, or ``file.py:function``, or a name on a hub."""
WrittenPath = Annotated[str, BeforeValidator(_text), PATHS[1]]
"""A folder that a run writes, or a program."""
FunctionName = Annotated[str, BeforeValidator(_text), AfterValidator(_named)]
"""A name of ours, or ``file.py:function``."""


def home(path: str | Path) -> Path:
    """Returns a path that is given to a command, with ``~`` and variables filled in.

    Raises:
        UserError: a variable is not set, or there is no such user.
    """
    try:
        return Path(expanded(str(path)))
    except ValueError as error:
        raise UserError(str(error)) from None
