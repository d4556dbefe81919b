"""Chat messages in the forms in which data sets keep them, read into the one that chat templates render."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeAlias

Messages: TypeAlias = list[dict[str, Any]]

STANDARD = ("system", "developer", "user", "assistant", "tool")
# Names of roles in ShareGPT's files, and in those that were made from them.
ALIASES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response"), "tool"),
}
# Names in a text of messages whose turn is a response.
_ANSWERS = r"['\"](role|from)['\"]\s*:\s*['\"](assistant|gpt|model|bot)['\"]"
_FORMS = "write messages as {role, content} with a text as content, or as ShareGPT's {from, value}"


class RefusedValue(ValueError):
    """A value of a row that is no prompt, no conversation or no response.

    Args:
        what: what is wrong, as the end of a sentence; the same for all rows of a kind.
        detail: the value itself or where it stands, which differs from row to row.
        why: the consequence of it.
        fix: how to mend it.
    """

    def __init__(self, what: str, *, detail: str = "", why: str = "", fix: str = _FORMS) -> None:
        self.what, self.detail, self.why, self.fix = what, detail, why, fix
        super().__init__(f"{what} ({detail})" if detail else what)


def read_messages(
    value: object, *, template: str = "", markers: Sequence[str] = (), empty_answers: bool = False
) -> Messages:
    """Reads a prompt or a conversation: a string, OpenAI's messages, ShareGPT's, or either as JSON text.

    A string is one message of the user. Keys without a value are left out, as Parquet fills them in; parts of text are
    joined; OpenAI's ``weight: 0`` is our ``train: false``. Other keys stay.

    Args:
        value: of the row.
        template: the chat template: a role that it names itself is not taken for another's alias.
        markers: texts that the template puts around turns, which no message may hold; see `chat.turn_markers`.
        empty_answers: whether the assistant's messages may be empty, as responses that are judged may.

    Raises:
        RefusedValue: it is something else, or a message has no text that can be rendered.
    """
    messages = messages_in(value) if isinstance(value, str) else value
    if messages is None and isinstance(value, str):
        return [_checked({"role": "user", "content": value}, markers)]
    if not isinstance(messages, list | tuple):
        raise RefusedValue(f"is {kind_of(messages)}, not a string or a list of chat messages")
    if not messages:
        raise RefusedValue("is an empty list", why="there is nothing to render", fix="leave the row out")
    read = []
    for i, message in enumerate(messages):
        try:
            read.append(_checked(_message(message, template), markers, empty_answers))
        except RefusedValue as refused:
            detail = f"message {i}" + (f": {refused.detail}" if refused.detail else "")
            raise RefusedValue(
                f"has a message that {refused.what}", detail=detail, why=refused.why, fix=refused.fix
            ) from None
    return read


def check_text(text: str, markers: Sequence[str] = ()) -> str:
    """Returns a text that can be tokenised as it stands.

    Raises:
        RefusedValue: it has half of a surrogate pair or a zero character, or holds what the chat template writes around
            turns.
    """
    if "\0" in text:
        raise RefusedValue(
            "holds a zero character",
            detail=f"at character {text.index(chr(0))}",
            why="tokenizers drop it or end there, and files of rollouts cannot show it",
            fix="clean the text: text.replace(chr(0), '')",
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RefusedValue(
                "holds half of a surrogate pair",
                detail=f"{text[error.start]!a} at character {error.start}",
                why="it is no character, so it has no tokens: an emoji that was cut in two, as a rule",
                fix="clean the text: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')",
            ) from None
    for marker in markers:
        if marker in text:
            raise RefusedValue(
                f"holds {marker!r}, which the chat template writes around turns",
                why="the model would see a turn end or begin there, and what follows would not be learned",
                fix="take it out of the text, or split the text into messages",
            )
    return text


def check_truth(value: object) -> None:
    """Checks that a ground truth is what JSON can hold, at any depth.

    Raises:
        RefusedValue: it has a number that is none, bytes, or half of a surrogate pair.
    """
    if isinstance(value, str) and not value.isascii():
        check_text(value.replace("\0", ""))
    elif isinstance(value, float) and not math.isfinite(value):
        raise RefusedValue(
            f"has {value} where a ground truth should be",
            why="an empty field of a table becomes this, and no response equals it",
            fix="fill in the ground truth, or leave the row out",
        )
    elif isinstance(value, bytes):
        raise RefusedValue("has bytes where a ground truth should be", fix="write it as text or numbers")
    elif isinstance(value, Mapping):
        for inside in value.values():
            check_truth(inside)
    elif isinstance(value, list | tuple):
        for inside in value:
            check_truth(inside)


def kind_of(value: object) -> str:
    """Returns the kind of a value, in JSON's words."""
    words = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    words |= {dict: "an object", type(None): "null"}
    return words.get(type(value), f"a {type(value).__name__}")


def _checked(message: dict[str, Any], markers: Sequence[str], empty_answers: bool = False) -> dict[str, Any]:
    """Returns a message in the one form, if its text can stand in a prompt."""
    content, role = check_text(message["content"], markers), message["role"]
    for call in message.get("tool_calls") or () if role == "assistant" else ():
        check_text(json.dumps(call["function"], ensure_ascii=False).replace("\\u0000", "\0"), markers)
    silent = (
        empty_answers or message.get("tool_calls") or message.get("reasoning_content") or message.get("train") is False
    )
    if not content.strip() and (role == "user" or (role == "assistant" and not silent)):
        raise RefusedValue(
            "is empty",
            detail="" if role == "user" else role,
            why="an empty prompt asks nothing, and of an empty response only the end would be learned",
            fix="fill in the text, or leave the row out",
        )
    return message


def _message(message: object, template: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RefusedValue(f"is {kind_of(message)}, not an object")
    given = {key: value for key, value in message.items() if value is not None}
    keys = f"its keys: {', '.join(map(str, given)) or 'none'}"
    roles = [_role(given[key], template) for key in ("role", "from") if key in given]
    if not roles:
        raise RefusedValue("has no role", detail=keys)
    if roles[0] != roles[-1]:
        raise RefusedValue("has two roles", detail=f"{roles[0]} and {roles[-1]}", fix="keep one of role and from")
    if roles[0] not in STANDARD and not _named(roles[0], template):
        near = get_close_matches(roles[0].strip().lower(), STANDARD, n=1)
        raise RefusedValue(
            "is from an unknown role",
            detail=repr(roles[0]),
            why="the chat template does not name this role, so it would write words that the model was never taught",
            fix=f"did you mean {near[0]!r}?" if near else f"rename it; known: {', '.join((*STANDARD, *ALIASES))}",
        )
    texts = [_text(given[key]) for key in ("content", "value") if key in given]
    if not texts and not (roles[0] == "assistant" and given.get("tool_calls")):
        raise RefusedValue("has no content", detail=keys, why="a template would render the turn empty, or stop")
    if texts and texts[0] != texts[-1]:
        raise RefusedValue("has both content and value, which differ", fix="keep one of them")
    rest = {key: value for key, value in given.items() if key not in ("role", "from", "content", "value")}
    if rest.get("train", True) not in (True, False):
        raise RefusedValue(
            "has a value of train that is neither true nor false", detail=repr(rest["train"]), fix="write true or false"
        )
    if "train" in rest:  # tables turn booleans into 0 and 1
        rest["train"] = bool(rest["train"])
    if roles[0] == "assistant" and rest.get("weight") in (0, 1):
        rest |= {"train": False} if not rest.pop("weight") else {}
    if roles[0] == "assistant" and rest.get("tool_calls"):
        rest["tool_calls"] = _calls(rest["tool_calls"])
    return {"role": roles[0], "content": texts[0] if texts else ""} | rest


def _calls(value: object) -> list[dict[str, Any]]:
    """Returns calls of tools in OpenAI's form, their arguments as an object; keys without a value are left out."""
    calls = []
    for call in value if isinstance(value, list | tuple) else [value]:
        given = call if isinstance(call, Mapping) else {}
        function = given.get("function") or given
        named = isinstance(function, Mapping) and isinstance(function.get("name"), str) and function["name"]
        arguments = arguments_of(function) if named else None
        if not isinstance(arguments, Mapping):
            raise RefusedValue(
                "has a call of a tool without a name" if not named else "has a call whose arguments are no object",
                detail=f"{call!r:.80}",
                why="the model would learn to write a call that no tool can answer",
                fix='write {"type": "function", "function": {"name": ..., "arguments": {...}}}, the arguments as an '
                "object or as JSON text of one",
            )
        text = isinstance(function.get("arguments"), str)  # what is null there is meant; a table fills nulls in
        ids = {key: given[key] for key in ("id",) if given.get(key) is not None}
        arguments = dict(arguments) if text else without_nulls(arguments)
        calls.append({**ids, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def arguments_of(function: Mapping[str, Any]) -> Any:
    """Returns the arguments of a call: of JSON text what it holds, or the text where it is none."""
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def without_nulls(value: Any) -> Any:
    """Returns a value without the keys that have no value, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): without_nulls(inside) for key, inside in value.items() if inside is not None}
    return [without_nulls(inside) for inside in value] if isinstance(value, list | tuple) else value


def _role(role: object, template: str) -> str:
    if not isinstance(role, str) or not role:
        raise RefusedValue("has a role that is no name", detail=repr(role))
    meant = role.lower() if role.lower() in STANDARD else ALIASES.get(role.lower(), role)
    return role if _named(role, template) and not _named(meant, template) else meant


def _named(role: str, template: str) -> bool:
    """Returns whether a template has its own name for this role."""
    return f"'{role}'" in template or f'"{role}"' in template


def _text(content: object) -> str:
    """Returns the text of a message: a string, or a list of parts that hold text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RefusedValue(f"has {kind_of(content)} as its content", detail=f"{content!r:.60}")
    return "".join(part if isinstance(part, str) else _part(part) for part in content)


def _part(part: object) -> str:
    found = part if isinstance(part, Mapping) else {}
    kind, text = found.get("type") or "text", found.get("text")
    if kind in ("text", "input_text", "output_text") and isinstance(text, str):
        return text
    raise RefusedValue(
        "has a part without text",
        detail=f"type {kind!r}" if found else kind_of(part),
        why="only text is rendered, and a prompt without the rest asks something else",
        fix='write parts as {"type": "text", "text": ...}; leave rows with images or other parts out',
    )


def messages_in(text: str) -> object | None:
    """Returns the messages in a text that is JSON of them, as files without nested columns hold it; None for other
    texts.
    """
    head = "".join(text[:60].split()).removeprefix("array(")
    if not head.startswith(("[{", "{")):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        if head.removeprefix("[").startswith(tuple(f"{{'{key}':" for key in ("role", "from", "content", "value"))):
            raise RefusedValue(
                "is Python's text of a list of messages, not the list",
                why="the model would be shown its brackets and quotes",
                fix="write the column with json.dumps, or as a list",
            ) from None
        return None
    if isinstance(found, dict):  # a single message is refused as the object that it is
        return found if {"role", "from"} & found.keys() and {"content", "value"} & found.keys() else None
    messages = isinstance(found, list) and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in found)
    return found if messages else None


def answer_in(value: object) -> object:
    """Reads a response that is JSON text of the assistant's turns as those turns; any other stays: responses may be
    JSON.
    """
    if not isinstance(value, str) or not re.search(_ANSWERS, value):
        return value
    found = messages_in(value)
    return found if isinstance(found, list) and all({"content", "value"} & m.keys() for m in found) else value
