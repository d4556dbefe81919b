"""Reads what rows hold as prompts and conversations that a chat template can show: every row of every command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.chat.messages import Messages, RefusedValue, check_text, kind_of, read_messages
from hybridflow.chat.template import CHAT, SHOWN, Style, as_messages, lost_turn, turn_markers
from hybridflow.data.sources import RowSet
from hybridflow.errors import UserError

_KINDS_TOLD = 5


class ConversationReader:
    """Reads the conversations of rows, and refuses those that a tokenizer's chat template cannot show.

    Args:
        tokenizer: with a template.
        style: how rows become text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: Style = CHAT) -> None:
        self.tokenizer, self.style = tokenizer, style
        self._template = str(tokenizer.chat_template or "")
        self.markers = turn_markers(tokenizer, style)
        self._lost: dict[tuple[tuple[str, ...], ...], str | None] = {}

    def read(self, value: object, *, empty_answers: bool = False) -> Messages:
        """Reads one message or several; see `messages.read_messages`.

        Raises:
            RefusedValue: they cannot be rendered.
        """
        return read_messages(value, template=self._template, markers=self.markers, empty_answers=empty_answers)

    def whole(self, messages: Messages, style: Style | None = None) -> Messages:
        """Returns a conversation, after a check that the template shows every turn.

        Args:
            messages: the conversation.
            style: how it becomes text, where its row has tools.

        Raises:
            RefusedValue: it would leave one out.
        """
        known = as_messages(messages, self.style)
        style = style or self.style
        shape = tuple((m["role"], "content" * bool(m["content"].strip()), *sorted(m.keys() & SHOWN)) for m in known)
        shape = (*shape, ("tools",) * bool(style.tools))
        if shape not in self._lost:
            self._lost[shape] = lost_turn(self.tokenizer, known, style)
        lost = self._lost[shape]
        if lost is not None:
            own = " (data.system_prompt)" if len(known) > len(messages) and lost.endswith("'system'") else ""
            raise RefusedValue(
                f"has {lost}{own} that the chat template leaves out",
                detail=f"the roles are {', '.join(str(m['role']) for m in known)}",
                why="the model would not see it, in training or in use",
                fix="put its text into a turn that the template writes, or use a model whose template has it",
            )
        return messages

    def prompt(self, value: object) -> Messages:
        """Reads a prompt: messages that end where a response begins.

        Raises:
            RefusedValue: it is no prompt.
        """
        return self.whole(self.question(value))

    def question(self, value: object) -> Messages:
        """Reads what comes before a response, in a prompt or in a longer conversation.

        Raises:
            RefusedValue: it is no such part, or ends in a response already.
        """
        messages = self.read(value)
        if messages[-1]["role"] == "assistant":
            raise RefusedValue(
                "ends in an assistant's turn",
                why="the chat template would close that turn and open another one after it",
                fix="end the prompt with a turn of the user or a tool; of a whole conversation take what is before the "
                "response",
            )
        return messages

    def text(self, value: object) -> str:
        """Reads a text that is tokenised as it is (``data.format=text``).

        Raises:
            RefusedValue: it is none, or cannot be tokenised.
        """
        if not isinstance(value, str):
            raise RefusedValue(
                f"is {kind_of(value)}, not a string (data.format is text)",
                fix="give a text, or leave data.format at chat",
            )
        return check_text(value)


def joined(prompt: Messages, turns: Messages) -> Messages:
    """Returns the conversation of a prompt and a response, which may repeat the prompt as whole conversations do.

    Raises:
        RefusedValue: the response begins with other turns than the prompt.
    """
    setting, asked = _settled(prompt)
    own, said = _settled(turns)
    if not asked or not said or turns[0]["role"] == "assistant":
        return [*prompt, *turns]
    same = [words(m) for m in said[: len(asked)]] == [words(m) for m in asked] and len(said) > len(asked)
    if same and (not own or not setting or [words(m) for m in own] == [words(m) for m in setting]):
        return [*(own or setting), *said]
    first, other = (setting[0], own[0]) if same else (asked[0], said[0])
    raise RefusedValue(
        "begins with other turns than the prompt",
        detail=f"{str(other['content'])[:40]!r} instead of {str(first['content'])[:40]!r}",
        why="the question would be asked twice",
        fix="give the response alone, or set data.prompt_key=null where responses are whole conversations",
    )


def words(message: dict[str, Any]) -> tuple[str, str]:
    """Returns the texts by which two turns are compared: files differ in the spaces around them."""
    return message["role"], message["content"].strip()


def _settled(messages: Messages) -> tuple[Messages, Messages]:
    """Splits the turns that set a conversation up from those that follow."""
    first = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
    return messages[:first], messages[first:]


class RowError(UserError):
    """A mistake in a row.

    Args:
        column: where it is; "" for the row as a whole.
        source: the source of the row.
        number: of the row in it.
        refused: what is wrong.
    """

    def __init__(self, column: str, source: str, number: int, refused: RefusedValue, *, also: str = "") -> None:
        self.column, self.source, self.number, self.refused = column, source, number, refused
        place = f"{column} of row {number} of {source}" if column else f"row {number} of {source}"
        super().__init__(f"{place} {refused}{also}", why=refused.why, fix=refused.fix)


@contextmanager
def reading(data: RowSet, index: int, column: str) -> Iterator[None]:
    """Adds the row and the column to the error of a value that the block refuses."""
    try:
        yield
    except RefusedValue as refused:
        raise RowError(column, *data.place(index), refused) from None


def require_rows(data: RowSet, reads: Callable[[int], object]) -> None:
    """Reads every row before anything starts, and reports all kinds of mistakes in one error.

    Raises:
        UserError: what is wrong with the first row of each kind, and how many there are.
    """
    found: dict[tuple[str, str], list[RowError]] = {}
    for i in range(len(data.rows)):
        try:
            reads(i)
        except RowError as error:
            found.setdefault((error.column, error.refused.what), []).append(error)
    if not found:
        return
    first, *others = ((errors[0], len(errors)) for errors in found.values())
    more = [_told(e, count) for e, count in others[:_KINDS_TOLD]]
    also = f"; so {_are(first[1] - 1)}" * (first[1] > 1) + "".join(f"\n  also: {line}" for line in more)
    raise RowError(first[0].column, first[0].source, first[0].number, first[0].refused, also=also)


def _told(error: RowError, count: int) -> str:
    return error.what + f"; so {_are(count - 1)}" * (count > 1)


def _are(count: int) -> str:
    return f"is {count} other row" if count == 1 else f"are {count} other rows"
