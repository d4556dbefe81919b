"""What environments return, made uniform and checked."""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hybridflow.chat.bridge import Bridge
from hybridflow.errors import UserError, nearest
from hybridflow.protocols.environments import Messages, Observation

MARK = "\n[... {count} tokens left out ...]\n"
_BYTES_PER_TOKEN = 40  # a text is tokenised only as far as this many for each token that is kept


def observation_of(value: Any, where: str) -> Observation:
    """Makes an observation of what an environment returned: a text is a message of the user.

    Args:
        value: a text, a message, messages, an `Observation`, or a dict with the fields of one.
        where: which method of which environment, for messages.

    Raises:
        UserError: it is none of these, or its reward is no number.
    """
    if isinstance(value, Mapping) and "role" not in value:
        given = dict(value)
        known = [each.name for each in fields(Observation)]
        unknown = next((name for name in given if name not in known), None)
        if unknown is not None:
            raise UserError(
                f"{where} returned a dict with {unknown!r}, which no observation has", fix=nearest(str(unknown), known)
            )
        value = Observation(**{"messages": []} | given)
    found = value if isinstance(value, Observation) else Observation(_messages(value, where))
    reward = found.reward
    if reward is not None and (isinstance(reward, str) or not _is_number(reward)):
        raise UserError(
            f"{where} returned the reward {reward!r}",
            why="a reward is a finite number, or None where there is none",
            fix="return Observation(..., reward=number)",
        )
    wrong = {name: v for name, v in found.info.items() if isinstance(v, str) or not _is_number(v)}
    if wrong:
        name, number = next(iter(wrong.items()))
        raise UserError(
            f"{where} returned info whose {name!r} is {number!r}",
            why="info holds numbers, which the run's metrics show",
            fix="leave it out; what the model should see belongs to the messages",
        )
    return Observation(
        _messages(found.messages, where),
        None if reward is None else float(reward),
        bool(found.done),
        _state(found.anchor, where),
        {name: float(v) for name, v in found.info.items()},
    )


def _messages(value: Any, where: str) -> Messages:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and all(map(_is_message, value)):
        return [dict(message) for message in value]
    raise UserError(
        f"{where} returned {type(value).__name__} {str(value)[:80]!r}",
        why="an observation is a text, a list of chat messages, or an Observation",
        fix="return Observation(messages=[{'role': 'user', 'content': ...}], reward=..., done=...)",
    )


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str | list | None)
    )


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _state(anchor: Any, where: str) -> str | int | None:
    """Returns a state as a text or a number; other values, such as a tuple of positions, become a text."""
    if anchor is None or isinstance(anchor, str):
        return anchor
    try:
        return operator.index(anchor)
    except TypeError:
        pass
    try:
        return json.dumps(anchor, sort_keys=True)
    except (TypeError, ValueError):
        raise UserError(
            f"{where} returned the anchor {str(anchor)[:80]!r}, a {type(anchor).__name__}",
            why="equal states must have equal anchors, and an object has another one each time",
            fix="give a text, a number, or a list or dict of them that describes the state",
        ) from None


def state_number(anchor: str | int) -> int:
    """Returns a number below 2^63 for a state, equal for equal states."""
    digest = hashlib.blake2b(repr(anchor).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def without_markers(content: Any, markers: Sequence[str]) -> tuple[Any, int]:
    """Breaks the texts of special tokens in an observation by a space; returns it, and how many there were.

    Otherwise a web page with ``<|im_end|>`` in it would end the result of a tool, and continue as the user.

    Args:
        content: of a message; one that is no text is left as it is.
        markers: texts of special tokens.
    """
    found = 0
    if isinstance(content, list):  # of parts: those of text
        parts = []
        for part in content:
            text, count = without_markers(part.get("text"), markers) if isinstance(part, dict) else (None, 0)
            parts.append({**part, "text": text} if count else part)
            found += count
        return parts, found
    if not isinstance(content, str):
        return content, 0
    for marker in markers:
        if marker and marker in content:
            found += content.count(marker)
            content = content.replace(marker, f"{marker[0]} {marker[1:]}")
    return content, found


def cut(content: Any, limit: int, bridge: Bridge) -> tuple[Any, int]:
    """Cuts a text that is too long in its middle; returns it, and how many tokens were left out.

    Args:
        content: of a message; one that is no text is left as it is.
        limit: most tokens.
        bridge: its tokenizer counts.
    """
    if not isinstance(content, str) or len(content.encode("utf-8", "replace")) <= limit:
        return content, 0  # a token is a byte at least
    room = limit * _BYTES_PER_TOKEN
    middle = max(0, len(content) - 2 * room)
    head, tail = (content, "") if not middle else (content[:room], content[-room:])
    ids = bridge.tokens(head)
    behind = bridge.tokens(tail) if middle else ids
    if not middle and len(ids) <= limit:
        return content, 0
    lost = len(ids) - limit if not middle else len(ids) + len(behind) - limit + middle // 4
    first, last = limit - limit // 2, limit // 2
    kept = bridge.text(ids[:first]), bridge.text(behind[len(behind) - last :])
    return MARK.format(count=lost).join(kept), lost
