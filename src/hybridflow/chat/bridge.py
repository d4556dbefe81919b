"""What a model is shown after a turn, as tokens behind the tokens that it sampled.

A sampled turn is never rendered again. After it, messages are appended as tokens, where the chat template does the same
in use. Where the template changes what stands before (it drops earlier thoughts, say), the model would see another
history in use: a new sequence begins there, a fork, whose reason is kept.

What a template does is found by rendering a short conversation of the same kind: a message of the user, the turn with
a sentinel in place of its text, and the new messages. So the price of a turn does not grow with its history. A
difference in white space alone is no reason to fork.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.chat.messages import Messages
from hybridflow.chat.template import CHAT, Style, apply_template
from hybridflow.errors import UserError

History = Literal["template", "append"]
THOUGHT_ENDS = "</think>"
_WORD, _THOUGHT, _ARGUMENT = "sentinelword", "sentinelthought", "sentinelargument"


@dataclass(frozen=True, slots=True)
class TurnKind:
    """What decides how a template treats a turn and what comes before it.

    Args:
        thinks: whether the turn has a thought.
        text: whether it has text beside its calls.
        calls: whether it has calls.
        thought_before: whether an earlier turn has a thought.
        news: the roles of the messages behind it.
    """

    thinks: bool
    text: bool
    calls: bool
    thought_before: bool
    news: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """What the model is shown next.

    Args:
        token_ids: behind the turn's tokens; of a fork, the whole new prompt.
        fork: why a new sequence begins; "" where the tokens are appended.
    """

    token_ids: list[int]
    fork: str = ""


@dataclass(slots=True)
class Bridge:
    """Renders conversations turn by turn.

    Args:
        tokenizer: of the model.
        style: how conversations become text, with the tools that prompts list.
        history: "template" forks where the template rewrites; "append" never does.
    """

    tokenizer: PreTrainedTokenizerBase
    style: Style = CHAT
    history: History = "template"
    _forks: dict[TurnKind, str] = field(default_factory=dict, init=False)
    _closing: str | None = field(default=None, init=False)

    def prompt(self, messages: Messages) -> list[int]:
        """Returns the tokens of a conversation, with the template's opening of the next turn."""
        return self.tokens(self._text(messages, opened=True))

    def after(self, messages: Messages, last_id: int | None, news: Messages) -> Rendered:
        """Returns what the model is shown after a turn.

        Args:
            messages: the conversation up to the turn, whose message is the last one.
            last_id: the last token of the turn; None for a turn without tokens.
            news: the messages behind it.

        Raises:
            UserError: the template refuses such messages.
        """
        kind = kind_of(messages, news)
        reason = "" if self.history == "append" else self.fork_of(kind)
        if reason:
            return Rendered(self.prompt([*messages, *news]), reason)
        behind = self._behind(messages[-1], news)
        written = "" if last_id is None else self.text([last_id])
        if written and behind.startswith(written):  # the turn closed itself; one that was cut gets its closing here
            behind = behind[len(written) :]
        return Rendered(self.tokens(behind))

    def fork_of(self, kind: TurnKind) -> str:
        """Returns why a new sequence begins after a turn of this kind; "" where tokens are appended."""
        if kind not in self._forks:
            self._forks[kind] = self._find_fork(kind)
        return self._forks[kind]

    def _find_fork(self, kind: TurnKind) -> str:
        early: Messages = [{"role": "user", "content": "question"}]
        if kind.thought_before:
            early += [_turn(thinks=True, text=True, calls=kind.calls, word="earlier")]
            early += [_news(role) for role in (["tool"] if kind.calls else ["user"])]
        turn = _turn(thinks=kind.thinks, text=kind.text, calls=kind.calls)
        before = self._text(early, opened=True)
        whole = self._text([*early, turn, *(_news(role) for role in kind.news)], opened=True)
        if not whole.startswith(before):
            return "the template rewrites what stands before the turn"
        kept = whole[len(before) :]
        if kind.thinks and _THOUGHT not in kept:
            return "the template drops the thoughts of earlier turns"
        if kind.text and _WORD not in kept:
            return "the template drops the text of the turn"
        if kind.calls and _ARGUMENT not in kept:
            return "the template drops the calls of the turn"
        if _squeezed(kept).startswith(_squeezed(turn["content"])):
            return ""
        return "the template writes the turn in another way than the model"

    def _behind(self, turn: Mapping[str, Any], news: Messages) -> str:
        """Returns the text that the template puts behind a turn of this kind: its closing, the new messages, and the
        opening of the next turn.
        """
        closing = self._turn_closing()
        calls = [dict(call) for call in turn.get("tool_calls") or ()]
        stub: dict[str, Any] = {"role": "assistant", "content": _WORD if turn.get("content") or not calls else ""}
        mark = _WORD
        if calls:
            last = dict(calls[-1]["function"])
            calls[-1]["function"] = last | {"arguments": {"x": _ARGUMENT}}
            stub["tool_calls"], mark = calls, _ARGUMENT
        whole = self._text([{"role": "user", "content": "question"}, stub, *news], opened=True)
        start = whole.find(mark)
        end = whole.find(closing, start + len(mark)) if start >= 0 else -1
        if end < 0:
            raise UserError(
                "the chat template has no place for what comes after a turn",
                why=f"a turn {'with calls ' if calls else ''}does not end in {closing!r} there, as turns end elsewhere",
                fix="use a chat template that renders tools, or agent.history=steps",
            )
        return whole[end:]

    def _turn_closing(self) -> str:
        """Returns what the template writes behind a turn that is the last one: the marker of its end."""
        if self._closing is None:
            whole = self._text([{"role": "user", "content": "question"}, {"role": "assistant", "content": _WORD}])
            self._closing = whole[whole.rfind(_WORD) + len(_WORD) :].rstrip("\n")
            if not self._closing:
                raise UserError(
                    "the chat template does not mark where a turn of the assistant ends",
                    why="what comes after a turn is put behind that mark",
                    fix="use a template that closes turns with a token, such as <|im_end|>",
                )
        return self._closing

    def _text(self, messages: Messages, *, opened: bool = False) -> str:
        return apply_template(self.tokenizer, messages, self.style, add_generation_prompt=opened)

    def tokens(self, text: str) -> list[int]:
        """Returns the tokens of a text, without those that a tokenizer puts around texts."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def text(self, token_ids: Sequence[int]) -> str:
        """Returns the text of tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))


def kind_of(messages: Messages, news: Messages) -> TurnKind:
    """Finds the kind of a turn, which is the last of these messages, and of what comes after it."""
    turns = [m for m in messages if m["role"] == "assistant"]
    return TurnKind(
        thinks=_thinks(turns[-1]),
        text=bool(turns[-1].get("content")) or not turns[-1].get("tool_calls"),
        calls=bool(turns[-1].get("tool_calls")),
        thought_before=any(_thinks(turn) for turn in turns[:-1]),
        news=tuple(dict.fromkeys(m["role"] for m in news)),
    )


def _thinks(turn: Mapping[str, Any]) -> bool:
    return THOUGHT_ENDS in str(turn.get("content") or "") or bool(turn.get("reasoning_content"))


def _turn(*, thinks: bool, text: bool, calls: bool, word: str = _WORD) -> dict[str, Any]:
    content = (f"<think>\n{_THOUGHT}\n{THOUGHT_ENDS}\n\n" if thinks else "") + (word if text else "")
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "tool", "arguments": {"x": _ARGUMENT}}}
    return {"role": "assistant", "content": content} | ({"tool_calls": [call]} if calls else {})


def _news(role: str) -> dict[str, Any]:
    return {"role": role, "content": "news"} | ({"tool_call_id": "abcdefghi", "name": "tool"} if role == "tool" else {})


def _squeezed(text: str) -> str:
    return "".join(text.split())
