"""What a tokenizer's chat template does with a conversation: which kinds of turn are appended to, and which fork.

Each kind is tried: a turn is tokenised as a model would have written it, the new messages are put behind it, and the
result is compared with a fresh rendering of the whole conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.chat.bridge import FORKS, Bridge, History
from hybridflow.chat.messages import Messages
from hybridflow.chat.template import Style
from hybridflow.chat.tool_calls import CallFormat
from hybridflow.errors import UserError

_THOUGHT = "<think>\nfirst, then second\n</think>\n\n"


@dataclass(frozen=True, slots=True)
class TurnFinding:
    """What a chat template does after one kind of turn.

    Args:
        kind: of turn, and what follows it.
        outcome: "appends", "forks" or "refused".
        why: the kind of the fork, or what the template refuses; "" where it appends.
    """

    kind: str
    outcome: str
    why: str = ""

    def line(self) -> str:
        """Describes it in one line."""
        told = f"{self.why}: {FORKS[self.why]}" if self.why in FORKS else self.why
        return f"{self.kind}: {self.outcome}" + f" ({told})" * bool(told)


@dataclass(frozen=True, slots=True)
class _Trial:
    """A conversation to try.

    Args:
        messages: up to the turn, which is the last one.
        written: the turn as the model wrote it.
        news: what follows.
        closed: whether the model ended the turn.
    """

    messages: Messages
    written: str
    news: Messages
    closed: bool = True


def certificate(
    tokenizer: PreTrainedTokenizerBase, style: Style, format: CallFormat, *, history: History = "template"
) -> list[TurnFinding]:
    """Tries each kind of turn; those with calls only where there are tools.

    Args:
        tokenizer: with its template.
        style: how conversations become text, with the tools.
        format: how calls are written.
        history: see `Bridge`.
    """
    bridge = Bridge(tokenizer, style, history)
    name = str(style.tools[0]["function"]["name"]) if style.tools else ""
    return [_find(bridge, kind, trial) for kind, trial in _trials(format, name).items()]


def _trials(format: CallFormat, tool: str) -> dict[str, _Trial]:
    asked: Messages = [{"role": "user", "content": "question"}]
    more: Messages = [{"role": "user", "content": "more"}]

    def said(text: str, written: str = "", *, closed: bool = True) -> _Trial:
        return _Trial([*asked, {"role": "assistant", "content": text}], written or text, more, closed)

    trials = {
        "text, then the user": said("an answer"),
        "a thought, then the user": said(f"{_THOUGHT}an answer"),
        "text with a space at its end": said("an answer "),
        "a turn that was cut": said("an answer that", closed=False),
    }
    if not tool:
        return trials
    arguments = {"key": "value"}
    call = {"id": "abcdefghi", "type": "function", "function": {"name": tool, "arguments": arguments}}
    result: Messages = [{"role": "tool", "tool_call_id": "abcdefghi", "name": tool, "content": "a result"}]
    body = format.render([(tool, arguments)])

    def called(text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": text, "tool_calls": [call]}

    cycle = [*asked, called(""), *result]
    thought: Mapping[str, Any] = {"role": "assistant", "content": f"{_THOUGHT}an answer"}
    return trials | {
        "a call, then its result": _Trial([*asked, called("")], body, result),
        "a second call": _Trial([*cycle, called("")], body, result),
        "a thought and a call, then its result": _Trial([*asked, called(_THOUGHT)], _THOUGHT + body, result),
        "after thoughts and calls, the user": _Trial(
            [*asked, called(_THOUGHT), *result, dict(thought)], f"{_THOUGHT}an answer", more
        ),
        "a call in other spaces": _Trial([*asked, called("")], body.replace(": ", ":  "), result),
    }


def _find(bridge: Bridge, kind: str, trial: _Trial) -> TurnFinding:
    end = bridge.tokenizer.eos_token_id
    sampled = bridge.tokens(trial.written) + ([int(end)] if trial.closed and end is not None else [])
    try:
        found = bridge.after(trial.messages, sampled[-1], trial.news)
        fresh = bridge.prompt([*trial.messages, *trial.news])
        shown = bridge.prompt(trial.messages[:-1])
    except UserError as error:
        return TurnFinding(kind, "refused", str(error.__cause__ or error.what))
    if found.fork:
        return TurnFinding(kind, "forks", found.fork)
    around = fresh[: len(shown)] == shown and fresh[len(fresh) - len(found.token_ids) :] == found.token_ids
    if bridge.history == "template" and not around:
        return TurnFinding(kind, "appends", "and the template would write other tokens")
    return TurnFinding(kind, "appends")
