"""What a model is shown of a function, and the check of the arguments that it gives: from signature and docstring.

The schema is OpenAI's, written as `transformers.utils.get_json_schema` writes it, because models learned that form.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pydantic
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError, PydanticUserError

from hybridflow.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEADER = re.compile(r"(Args|Arguments|Parameters|Returns?|Yields?|Raises|Examples?|Notes?|Attributes):\s*")
_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")
_FIELD = re.compile(r"^:(param|type|returns?|rtype|raises)\b([^:]*):", re.M)
# of bare lists and dicts
_IMPLIED: tuple[tuple[str, Any], ...] = (("items", {}), ("additionalProperties", True), ("additionalProperties", False))
_ANNOTATE = "def add(a: int, b: int) -> int: ..."


class WrongArguments(ValueError):
    """The arguments of a call do not fit; its text tells the model how."""


@dataclass(frozen=True, slots=True)
class Described:
    """A function as a model sees it.

    Args:
        name: of the tool.
        schema: in OpenAI's form.
        model: checks arguments; its fields are numbered, and their aliases are the names of the arguments.
    """

    name: str
    schema: dict[str, Any]
    model: type[pydantic.BaseModel]

    def cast(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns arguments in the types of the signature.

        Raises:
            WrongArguments: one is missing, unknown or of another type.
        """
        try:
            checked = self.model.model_validate(dict(given))
        except pydantic.ValidationError as error:
            raise WrongArguments("; ".join(_told(one) for one in error.errors()) + f". {self._takes()}") from None
        fields = self.model.model_fields
        return {str(fields[name].alias): getattr(checked, name) for name in checked.model_fields_set}

    def _takes(self) -> str:
        parameters = self.schema["function"]["parameters"]
        needed = parameters.get("required", ())
        names = [name if name in needed else f"{name} (optional)" for name in parameters["properties"]]
        return f"{self.name} takes {', '.join(names) or 'no arguments'}"


def described(function: Callable[..., Any], name: str, *, method: bool = False) -> Described:
    """Describes a function.

    Args:
        function: plain or async.
        name: of the tool.
        method: whether its first parameter is the object, which no call gives.

    Raises:
        UserError: it cannot be described to a model: no docstring, no annotation, a type that JSON cannot hold.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name} is no name of a tool",
            why="a model calls a tool by its name, of letters, digits, _ and -",
            fix="write the tool as `def name(...)`",
        )
    summary, texts = parse_docstring(inspect.getdoc(function) or "")
    if not summary:
        raise UserError(
            f"the tool {name} has no docstring",
            why="its docstring is all that the model reads about it",
            fix="say in a docstring what it does, and describe its arguments in a section `Args:`",
        )
    try:
        parameters = list(inspect.signature(function, eval_str=True).parameters.values())[int(method) :]
    except NameError as error:
        raise UserError(
            f"an annotation of the tool {name} cannot be read: {error}", fix="import the type where the tool is"
        ) from error
    for parameter in parameters:
        _require_usable(name, parameter)
    fields: dict[str, Any] = {
        f"argument_{i}": (p.annotation, pydantic.Field(... if p.default is p.empty else p.default, alias=p.name))
        for i, p in enumerate(parameters)
    }
    config = pydantic.ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    try:
        model = pydantic.create_model(name, __config__=config, **fields)
        whole = model.model_json_schema(by_alias=True)
    except (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema, PydanticUserError) as error:
        raise UserError(
            f"the tool {name} has an argument that no JSON can be: {str(error).splitlines()[0]}",
            why="a model writes the arguments of a call as JSON",
            fix="use str, int, float, bool, list, dict, Literal, Enum, a TypedDict, a dataclass or a pydantic model",
        ) from error
    properties = {}
    for key, value in whole.get("properties", {}).items():
        properties[key] = _plain(value, whole.get("$defs", {}), name)
        if key in texts:
            properties[key].pop("description", None)
            properties[key]["description"] = texts[key]
    stated: dict[str, Any] = {"type": "object", "properties": properties}
    if whole.get("required"):
        stated["required"] = whole["required"]
    schema = {"type": "function", "function": {"name": name, "description": summary, "parameters": stated}}
    return Described(name, schema, model)


def _require_usable(name: str, parameter: inspect.Parameter) -> None:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
        raise UserError(
            f"the tool {name} takes {parameter}",
            why="a model gives arguments by name, and has to know each name",
            fix=f"give each argument a name: {_ANNOTATE}",
        )
    if parameter.annotation is parameter.empty:
        raise UserError(
            f"the argument {parameter.name} of the tool {name} has no annotation",
            why="the model is shown the type of each argument, and what it gives is cast to it",
            fix=f"annotate it: {_ANNOTATE}",
        )


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Returns what a docstring says of a function, and of each of its arguments.

    Arguments are described in a section ``Args:`` (Google's style), or as ``:param name: text``; plain text describes
    the function alone.

    >>> parse_docstring("Adds.\\n\\nArgs:\\n    a: first one\\n    b (int): second")
    ('Adds.', {'a': 'first one', 'b': 'second'})
    """
    lines = inspect.cleandoc(text).splitlines()
    headers = [i for i, line in enumerate(lines) if _HEADER.fullmatch(line)]
    summary = "\n".join(lines[: headers[0]] if headers else lines)
    found: dict[str, str] = {}
    for place, header in enumerate(headers):
        if lines[header].strip().rstrip(":") in ("Args", "Arguments", "Parameters"):
            end = headers[place + 1] if place + 1 < len(headers) else len(lines)
            found |= _entries(lines[header + 1 : end])
    marks = list(_FIELD.finditer(summary))
    for mark, after in zip(marks, [*marks[1:], None]):
        if mark[1] == "param" and mark[2].split():
            end = after.start() if after is not None else len(summary)
            found[mark[2].split()[-1]] = " ".join(summary[mark.end() : end].split())
    return (summary[: marks[0].start()] if marks else summary).strip(), found


def _entries(lines: list[str]) -> dict[str, str]:
    """Returns the entries of a section, each a name and its text, which may continue in lines with more indent."""
    filled = [line for line in lines if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in filled), default=0)
    found: dict[str, str] = {}
    last = ""
    for line in filled:
        entry = _ENTRY.fullmatch(line.strip()) if len(line) - len(line.lstrip()) == indent else None
        if entry is not None:
            last = entry[1]
            found[last] = entry[2]
        elif last:
            found[last] = f"{found[last]} {line.strip()}".strip()
    return found


def _plain(node: Any, definitions: Mapping[str, Any], name: str, above: tuple[str, ...] = ()) -> Any:
    """Returns a schema of pydantic in the form that models know: no titles, defaults or references."""
    if isinstance(node, list):
        return [_plain(inner, definitions, name, above) for inner in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        key = node["$ref"].rpartition("/")[2]
        if key in above:
            raise UserError(f"the tool {name} has an argument whose type {key} holds itself", fix="use a plain dict")
        rest = {k: v for k, v in node.items() if k != "$ref"}
        return _plain({**definitions[key], **rest}, definitions, name, (*above, key))
    kept = {k: v for k, v in node.items() if k not in ("title", "default", "const") and (k, v) not in _IMPLIED}
    if "const" in node:  # a Literal of one value
        kept["enum"] = [node["const"]]
    options = kept.pop("anyOf", None)
    plain: dict[str, Any] = {}
    if options is not None:
        plain = _union([option for option in options if option != {"type": "null"}], definitions, name, above)
        if {"type": "null"} in options:
            plain["nullable"] = True
    for key in sorted(kept, key=lambda key: (key != "type", key == "description")):
        inner = kept[key]
        if key == "properties":
            plain[key] = {k: _plain(v, definitions, name, above) for k, v in inner.items()}
        else:
            plain[key] = inner if key in ("enum", "required") else _plain(inner, definitions, name, above)
    return plain


def _union(options: list[Any], definitions: Mapping[str, Any], name: str, above: tuple[str, ...]) -> dict[str, Any]:
    found = [_plain(option, definitions, name, above) for option in options]
    if len(found) == 1:
        only: dict[str, Any] = found[0]
        return only
    if all(option.keys() == {"type"} for option in found):
        return {"type": [option["type"] for option in found]}
    return {"anyOf": found}


def _told(error: Any) -> str:
    """Returns what is wrong with an argument, for the model."""
    place = ".".join(map(str, error["loc"]))
    said = {"missing": "it is missing", "extra_forbidden": "there is no such argument"}.get(error["type"])
    if said is None:
        said = f"{error['msg'][:1].lower()}{error['msg'][1:]}, not {str(error['input'])[:60]!r}"
    return f"{place}: {said}" if place else said
