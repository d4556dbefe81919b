"""Rows to prompts, for reinforcement learning and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.chat.messages import Messages, RefusedValue, check_truth
from hybridflow.chat.template import Style, as_messages, prompt_text, require_template, tokenize
from hybridflow.config.sections.data import PromptDataSection, SourceSection
from hybridflow.data.reader import ConversationReader, reading, require_rows
from hybridflow.data.rows import Row, column, has_column, require_one_schema
from hybridflow.data.sampler import Sampler
from hybridflow.data.sources import RowSet, Sources, read_sources
from hybridflow.errors import UserError
from hybridflow.protocols.rewards import Answers

VERL_TRUTH = "reward_model.ground_truth"  # where verl's rows have it
TRUTH_KEY = "data.ground_truth_key"
_CHUNK = 1000  # rows tokenised together


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready for generation.

    Args:
        token_ids: the rendered prompt, the template's opening of the response included.
        text: the rendered prompt, as the model sees it.
        messages: the prompt as chat messages.
        ground_truth: what the reward compares with; None where the rows have none.
        row: the whole row, for the reward.
        written: the prompt as the row has it: a string, or chat messages.
    """

    token_ids: tuple[int, ...]
    text: str
    messages: Messages
    ground_truth: Any
    row: Row
    written: Any

    @property
    def data_source(self) -> str:
        """Name of the data set, for metrics: the row's own, else "data"."""
        return str(self.row.get("data_source") or "data")


@dataclass(slots=True)
class PromptSet:
    """All prompts of one or several sources, rendered when they are asked for.

    Args:
        data: the rows.
        config: which columns, which limit.
        tokenizer: renders and tokenises.
        over_long: number of prompts that were left out or are cut, as ``data.over_long`` says.
        tools: schemas of the tools that prompts list.
        made_later: whether an environment makes a prompt of each row when its episode begins; the rows then need none.
    """

    data: RowSet
    config: PromptDataSection
    tokenizer: PreTrainedTokenizerBase
    over_long: int = 0
    tools: tuple[Mapping[str, Any], ...] = ()
    made_later: bool = False
    reader: ConversationReader = field(init=False)

    def __post_init__(self) -> None:
        self.reader = ConversationReader(self.tokenizer, self.style)

    def __len__(self) -> int:
        return len(self.data.rows)

    def __getitem__(self, index: int) -> Prompt:
        """Returns the prompt of a row.

        Raises:
            UserError: a column is missing, it holds no prompt, or the prompt is over the limit.
        """
        if self.made_later:
            row, key = self.data.rows[index], truth_key(self.data.rows[index], self.config)
            truth = column(row, key, source="", index=index) if key is not None and has_column(row, key) else None
            return Prompt((), "", [], truth, row, None)
        value, truth = self.values(index)
        text = prompt_text(self.tokenizer, value, self.style)
        [ids] = tokenize(self.tokenizer, [text], self.style)
        limit = self.config.max_prompt_tokens
        if len(ids) > limit and self.config.over_long == "truncate":
            ids = ids[-limit:]
            text = str(self.tokenizer.decode(ids))
        elif len(ids) > limit:
            source, number = self.data.place(index)
            raise UserError(
                f"the prompt of row {number} of {source} has {len(ids)} tokens, data.max_prompt_tokens is {limit}",
                fix="raise the limit or leave the row out (data.over_long=filter does)",
            )
        row = self.data.rows[index]
        written = column(row, self.config.prompt_key, source="", index=index)
        return Prompt(tuple(ids), text, as_messages(value, self.style), truth, row, written)

    @property
    def source(self) -> str:
        """A description of the source of the rows."""
        return self.data.name

    @property
    def fingerprint(self) -> str:
        """Changes with the rows that are drawn from; see `RowSet.fingerprint`."""
        return self.data.fingerprint()

    @property
    def style(self) -> Style:
        """How prompts become text."""
        return Style(self.config.format, self.config.system_prompt, self.config.thinking, self.tools)

    def sampler(self, *, seed: int) -> Sampler:
        """Draws from these prompts, in the order of ``data.order`` and by the weights of the sources."""
        return self.data.sampler(self.config.order, seed=seed)

    def measure(self, count: int | None = None) -> Iterator[tuple[str, int]]:
        """Yields rendered text and number of tokens of each of the first prompts, before any cut; tokenises in batches.

        Raises:
            UserError: see `__getitem__`, without the limit.
        """
        count = len(self) if count is None else min(count, len(self))
        for first in range(0, count, _CHUNK):
            values = [self.values(i)[0] for i in range(first, min(first + _CHUNK, count))]
            texts = [prompt_text(self.tokenizer, value, self.style) for value in values]
            yield from zip(texts, map(len, tokenize(self.tokenizer, texts, self.style)))

    def notes(self) -> list[str]:
        """Describes what was done about over-long prompts."""
        done = {"filter": "left out", "truncate": "cut at their beginning"}.get(self.config.over_long)
        limit = self.config.max_prompt_tokens
        return [f"prompts of more than {limit} tokens, {done}: {self.over_long}"] if done else []

    def values(self, index: int) -> tuple[str | Messages, Any]:
        """Returns prompt (a string where the format is text) and ground truth of a row.

        Raises:
            UserError: a column is missing.
            RowError: the columns hold no prompt, or no ground truth.
        """
        row, c = self.data.rows[index], self.config
        source, number = self.data.place(index)
        value = column(row, c.prompt_key, source=source, index=number, setting="data.prompt_key")
        key, truth = truth_key(row, c), None
        if key is not None:
            truth = _truth(row, key, source=source, index=number)
            with reading(self.data, index, key):
                check_truth(truth)
        with reading(self.data, index, c.prompt_key):
            prompt = self.reader.prompt(value) if c.format == "chat" else self.reader.text(value)
            if not prompt:
                raise RefusedValue(
                    "is empty", why="a model needs at least one token to continue", fix="leave the row out"
                )
        return prompt, truth


def truth_key(row: Row, config: PromptDataSection) -> str | None:
    """Returns the column of the ground truth: as configured, or where verl's rows have it; None: there is none."""
    key = config.ground_truth_key
    return VERL_TRUTH if key == "ground_truth" and key not in row and has_column(row, VERL_TRUTH) else key


def load_prompts(
    sources: Sources,
    config: PromptDataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    tools: Sequence[Mapping[str, Any]] = (),
    made_later: bool = False,
) -> PromptSet:
    """Reads data sources for prompts; with ``data.over_long`` filter or truncate every prompt is measured.

    Args:
        sources: where the rows are.
        config: which columns, which limit.
        tokenizer: renders and tokenises.
        seed: of the order.
        tools: see `PromptSet`.
        made_later: see `PromptSet`.

    Raises:
        UserError: a source cannot be read, its rows are of different kinds, or the tokenizer has no chat template.
    """
    data = read_sources(sources, seed=seed)
    prompts = PromptSet(data, config, tokenizer, tools=tuple(tools), made_later=made_later)
    require_template(tokenizer, prompts.style)
    if made_later:
        return prompts
    for part, source in zip(data.parts(), data.sources):
        rows = data.rows[part.start : part.stop]
        keys, truth = {config.prompt_key: "data.prompt_key"}, truth_key(rows[0], config)
        if truth is not None and any(has_column(row, truth) for row in rows):  # else the first row's error helps
            keys[truth] = "data.ground_truth_key"
        require_one_schema(rows, keys, source=source.source)
    require_rows(data, prompts.values)
    if config.over_long == "refuse":
        return prompts
    fits = [tokens <= config.max_prompt_tokens for _, tokens in prompts.measure()]
    if config.over_long == "filter":
        data = data.keep([i for i, fit in enumerate(fits) if fit])
    return PromptSet(data, config, tokenizer, over_long=fits.count(False), tools=tuple(tools))


def environment_tasks(count: int, config: PromptDataSection, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """Returns the rows of an environment that makes its tasks by itself: each holds its number, as ``index``.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    rows: list[Row] = [{"index": i, "data_source": "environment"} for i in range(count)]
    source = SourceSection(source="the environment's tasks")
    prompts = PromptSet(RowSet(rows, (source,), (0,), range(count)), config, tokenizer, made_later=True)
    require_template(tokenizer, prompts.style)
    return prompts


def answers_to(prompt: Prompt, texts: list[str], token_ids: Sequence[Sequence[int]]) -> Answers:
    """Returns responses to a prompt, as a grader takes them."""
    return Answers(texts, prompt.ground_truth, prompt.messages, prompt.row, prompt.written, token_ids)


def _truth(row: Row, key: str, *, source: str, index: int) -> Any:
    try:
        return column(row, key, source=source, index=index, setting=TRUTH_KEY)
    except UserError as error:
        none = f"where the reward needs no ground truth, set {TRUTH_KEY}=null"
        raise UserError(error.what, why=error.why, fix=f"{error.fix}; {none}" if error.fix else none) from error
