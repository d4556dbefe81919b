"""YAML as a configuration has it: 1e-4 is a number, and a key that occurs twice is a mistake."""

from __future__ import annotations

import re
from typing import Any

import yaml

from hybridflow.errors import UserError


class Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number; YAML 1.1 reads a string."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(text: str, source: str) -> Any:
    """Reads the plain values of a YAML text.

    Args:
        text: the YAML.
        source: how to call it in messages.

    Raises:
        UserError: it is not YAML, or a key occurs twice in one section (the second would replace the first).
    """
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        refuse_repeated(node, (), source)
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {error}") from error
    except ValueError as error:  # such as a date of month 13
        raise UserError(f"{source} has a value that cannot be read: {error}", fix="quote it") from error


def refuse_repeated(node: Any, above: tuple[str, ...], source: str) -> None:
    """Raises a UserError where a key occurs twice in one section below a node."""
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            refuse_repeated(entry, above, source)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            raise UserError(
                f"{source} has {'.'.join((*above, name))} twice, in lines {lines[name]} and {line}",
                why="the second would replace the first, with all that is in it",
                fix="join the two, or remove one",
            )
        lines[name] = line
        refuse_repeated(value, (*above, name), source)
