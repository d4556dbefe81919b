"""What a model is shown after a turn, as tokens behind the tokens that it sampled.

A sampled turn is never rendered again. After it, messages are appended as tokens, where the chat template does the same
in use. Where the template changes what stands before (it drops earlier thoughts, say), the model would see another
history in use: a new sequence begins there, a fork, whose kind is kept.

What a template does is found by rendering stand-ins of the conversation (`shapes.py`), once for each shape. The text of
new messages comes from rendering them behind a short conversation, or a longer one where the template needs it; so the
price of a turn does not grow with its history. How the model wrote a turn (spaces, the order of keys in a call) is no
reason to fork: its own tokens stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.chat.messages import Messages
from hybridflow.chat.shapes import Shape, argument, behind_of, marked_calls, recent, shape_of, stand_ins, thought, word
from hybridflow.chat.template import CHAT, Style, apply_template
from hybridflow.errors import UserError

History = Literal["template", "append"]

FORKS = {  # kinds of forks, each with what the chat template does
    "thoughts dropped": "it leaves out the thoughts of earlier turns",
    "opening rewritten": "it opens an earlier turn in another way than the turn that is generated",
    "beginning rewritten": "it writes what stands before the turn in another way once the turn is over",
    "text dropped": "it leaves out the text of the turn",
    "calls dropped": "it leaves out the calls of the turn",
    "turn rewritten": "it writes the turn in another way than the model",
    "closing rewritten": "it ends an earlier turn in another way than the last one",
}
_MOST_KNOWN = 10_000  # shapes of conversations that are kept
_Key = tuple[tuple[Shape, ...], Shape, tuple[Shape, ...]]


@dataclass(frozen=True, slots=True)
class Rendered:
    """What the model is shown next.

    Args:
        token_ids: behind the turn's tokens; of a fork, the whole new prompt.
        fork: why a new sequence begins, a key of `FORKS`; "" where the tokens are appended.
    """

    token_ids: list[int]
    fork: str = ""


@dataclass(frozen=True, slots=True)
class _Found:
    """What a template does after a turn of one shape.

    Args:
        fork: see `Rendered.fork`.
        before: stand-ins of the messages before the turn, as few as the template needs to write what comes after it.
        turn: a stand-in of the turn.
        number: of the stand-in, which its words have.
        own: number of characters between the turn's last word and its closing, which the model writes.
    """

    fork: str
    before: Messages
    turn: dict[str, Any]
    number: int
    own: int


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
    _known: dict[_Key, _Found] = field(default_factory=dict, init=False)
    _mark: str | None = field(default=None, init=False)

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
        found = self._find(messages, news)
        if found.fork and self.history == "template":
            return Rendered(self.prompt([*messages, *news]), found.fork)
        turn, calls = found.turn, messages[-1].get("tool_calls") or ()
        if calls:
            turn = turn | {"tool_calls": marked_calls(calls, found.number)}
        shown = self._text([*found.before, turn, *news], opened=True)
        behind = behind_of(shown, turn, found.number)[found.own :]
        closed = "" if last_id is None else self.text([last_id])
        ids = self.tokens(behind)
        if closed and behind.startswith(closed):
            return Rendered(ids[1:] if ids[:1] == [last_id] else self.tokens(behind[len(closed) :]))
        if closed == self._closing_mark() and found.fork == "closing rewritten":
            return Rendered(ids[1:])  # the turn ends as a last turn does, and stays so
        return Rendered(ids)  # the turn was cut: its closing is context

    def fork_after(self, messages: Messages, news: Messages) -> str:
        """Returns why a new sequence begins between a turn, the last of the messages, and new messages; "" where the
        template appends.
        """
        return self._find(messages, news).fork

    def _find(self, messages: Messages, news: Messages) -> _Found:
        shapes = [shape_of(message) for message in messages]
        key = (recent(shapes[:-1]), shapes[-1], tuple(map(shape_of, news)))
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._try(*key)
        return self._known[key]

    def _try(self, early: tuple[Shape, ...], shape: Shape, news: tuple[Shape, ...]) -> _Found:
        messages, here = stand_ins([*early, shape, *news]), len(early)
        before, turn = messages[:here], messages[here]
        opened = self._text(before, opened=True)
        whole = self._text(messages, opened=True)
        behind = behind_of(whole, turn, here)
        if not behind:
            raise UserError(
                "the chat template shows neither the text nor the calls of a turn",
                why=f"of a turn of the assistant {_described(shape)} nothing is in the conversation that follows",
                fix="use a chat template that renders calls of tools, or agent.history=steps",
            )
        alone = behind_of(self._text(messages[: here + 1]), turn, here)
        mark = self._closing_mark()
        own = alone.partition(mark)[0]  # what the model itself writes behind the last word
        start = len(own) if behind.startswith(own) else max(behind.find(mark), 0)
        fork = self._fork(messages, here, opened, whole)
        if not fork and alone and not behind.startswith(alone.rstrip("\n")):
            fork = "closing rewritten"
        return _Found(fork, self._short(messages, here, behind), turn, here, start)

    def _short(self, messages: Messages, here: int, behind: str) -> Messages:
        """Returns as few messages before a turn as the template needs to write the same behind it."""
        first = next((i for i, message in enumerate(messages[:here]) if message["role"] == "user"), here - 1) + 1
        short = self._text([*messages[:first], *messages[here:]], opened=True)
        return messages[: first if behind_of(short, messages[here], here) == behind else here]

    def _fork(self, messages: Messages, here: int, opened: str, whole: str) -> str:
        """Returns a key of `FORKS`, or ""."""
        if not whole.startswith(opened):
            thoughts = [thought(i) for i in range(here)]
            if any(known in opened and known not in whole for known in thoughts):
                return "thoughts dropped"
            unopened = self._text(messages[:here])
            return "opening rewritten" if whole.startswith(unopened) else "beginning rewritten"
        kept, turn = whole[len(opened) :], messages[here]
        if shape_of(turn)[2] and thought(here) not in kept:
            return "thoughts dropped"
        if word(here) in turn["content"] and word(here) not in kept:
            return "text dropped"
        if any(argument(here, i) not in kept for i, _ in enumerate(turn.get("tool_calls") or ())):
            return "calls dropped"
        thinks_aside = shape_of(turn)[2] == "key"
        written = _squeezed(turn["content"])
        return "" if thinks_aside or _squeezed(kept).startswith(written) else "turn rewritten"

    def _closing_mark(self) -> str:
        """Returns the text of the token that ends a turn."""
        if self._mark is None:
            messages = stand_ins([("user", True, "", 0, ""), ("assistant", True, "", 0, "")])
            closing = behind_of(self._text(messages), messages[1], 1)
            first = self.tokens(closing)[:1]
            self._mark = self.text(first).strip("\n") if closing else ""
            if not self._mark:
                raise UserError(
                    "the chat template does not mark where a turn of the assistant ends",
                    why="what comes after a turn is put behind that mark",
                    fix="use a template that closes turns with a token, such as <|im_end|>",
                )
        return self._mark

    def tokens(self, text: str) -> list[int]:
        """Returns the tokens of a text, without those that a tokenizer puts around texts. Half of a surrogate pair
        has no tokens: it becomes the replacement character.
        """
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def text(self, token_ids: Sequence[int]) -> str:
        """Returns the text of tokens, special tokens included."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def _text(self, messages: Messages, *, opened: bool = False) -> str:
        return apply_template(self.tokenizer, messages, self.style, add_generation_prompt=opened)


def _described(shape: Shape) -> str:
    _, text, thinks, calls, _ = shape
    parts = ["a thought"] * bool(thinks) + ["text"] * text + [f"{calls} call{'s' * (calls > 1)}"] * bool(calls)
    return f"with {' and '.join(parts)}"


def _squeezed(text: str) -> str:
    return "".join(text.split())
