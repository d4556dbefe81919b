"""A `Grader` around a reward model: a sequence classifier scores conversations.

The responses to one prompt are scored as a batch of their own, so a score never depends on what else is being scored,
and a resumed run gets the same scores.

Shapes: T tokens of all conversations of a batch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.chat.messages import Messages
from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.sections.rewards import RewardModelSection
from hybridflow.data.preference import last_read, readings, use_template
from hybridflow.devices import pick_device
from hybridflow.errors import UserError
from hybridflow.models.classifier import classifier_config, padding_of
from hybridflow.models.families import KNOWN
from hybridflow.models.load import context_of
from hybridflow.placing.build import load_role, local_reference
from hybridflow.placing.places import Places
from hybridflow.placing.role import reward_role
from hybridflow.protocols.rewards import Answers, Failure, Score
from hybridflow.protocols.training import Pending, Scorer
from hybridflow.protocols.waiting import never

MARK = "\x02answer\x03"  # rendered in a response's place, to find that place
MOST_WORDS = 200  # of a failure, in characters


@dataclass(slots=True)
class _ReadAnswer:
    """A response as the model reads it.

    Args:
        token_ids: of the conversation; empty where there is none.
        read: the tokens to read at, ascending, each once.
        steps: of a process reward model: after how many characters each step ends, and which of `read` it is read at.
        failure: why it cannot be read.
    """

    token_ids: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)
    failure: Failure | None = None


class ModelGrader:
    """A `Grader` around a reward model.

    A model in a pool scores one group while others are generated; one in this process scores when it is called.

    Args:
        scorer: gives "value" of sequences: the model.
        tokenizer: the model's own, with the template that conversations are rendered with.
        section: ``reward.model``.
        padding: the token that the model is not read at; see `data.preference.last_read`.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        section: RewardModelSection,
        *,
        padding: int | None = None,
    ) -> None:
        self.scorer, self.tokenizer, self.section, self.padding = scorer, tokenizer, section, padding
        self.should_return: Callable[[], bool] = never  # wait for a score in flight
        self._under_way: dict[int, tuple[Pending | None, Callable[[], list[Score]]]] = {}

    def submit(self, key: int, answers: Answers, function: str | None = None) -> None:
        """See `Grader.submit`."""
        found = [self._read(answers, response) for response in answers.responses]
        there = [reading for reading in found if reading.failure is None]
        values: Pending | None = None
        if there:
            batch = readings([reading.token_ids for reading in there], [reading.read for reading in there])
            mask_T, lengths = batch["loss_mask_T"], [len(reading.read) for reading in there]
            values = self.scorer.score_later(batch, ["value"])

        def scores() -> list[Score]:
            parts = iter(() if values is None else values()["value"][mask_T].split(lengths))
            return [
                Score(0.0, failure=reading.failure)
                if reading.failure is not None
                else self._score(reading, next(parts).tolist())
                for reading in found
            ]

        self._under_way[key] = values, scores

    def ready(self) -> list[tuple[int, list[Score]]]:
        """See `Grader.ready`."""
        done = [key for key, (values, _) in self._under_way.items() if values is None or values.done()]
        return [(key, self._under_way.pop(key)[1]()) for key in done]

    def wait(self) -> list[tuple[int, list[Score]]]:
        """See `Grader.wait`: what has been scored, else what was submitted first."""
        first = next(iter(self._under_way), None)
        return self.ready() or ([] if first is None else [(first, self._under_way.pop(first)[1]())])

    def cancel(self) -> None:
        """See `Grader.cancel`."""
        self._under_way.clear()

    def check(self) -> None:
        """See `Grader.check`: nothing can have gone since `check_reward_model`."""

    def close(self) -> None:
        """See `Grader.close`: the model's processes end with those of the run."""
        self.cancel()

    def _read(self, answers: Answers, response: str) -> _ReadAnswer:
        """Returns a response's tokens, and the places at which they are read; a failure where it cannot be read."""
        messages = [*answers.prompt, {"role": "assistant", "content": response}]
        try:
            text = _render(self.tokenizer, messages)
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids: list[int] = list(encoded.input_ids)
            if len(ids) > self.section.max_tokens:
                return self._failed(
                    f"{len(ids)} tokens, reward.model.max_tokens is {self.section.max_tokens}", response, "refused"
                )
            if self.section.step_separator is None:
                return _ReadAnswer(ids, [last_read(ids, self.padding)])
            place = self._place(answers.prompt, text, response)
        except TemplateError as error:
            return self._failed(f"its template refuses the conversation: {error}", response, "raised")
        if place is None:
            return self._failed("its template rewrites the response, so steps have no place", response, "refused")
        ends = step_ends(response, self.section.step_separator)
        start, kept = place
        where = [_token_before(encoded.offset_mapping, start + min(end, kept)) for end in ends]
        read = sorted(set(where))
        return _ReadAnswer(ids, read, [(end, read.index(token)) for end, token in zip(ends, where)])

    def _failed(self, what: str, response: str, kind: str) -> _ReadAnswer:
        text = f"the reward model {self.section.path}: {what}; response {response!r}"
        return _ReadAnswer(failure=Failure(kind, text[:MOST_WORDS]))

    def _score(self, reading: _ReadAnswer, values: Sequence[float]) -> Score:
        if not all(map(_finite, values)):
            return Score(0.0, failure=Failure("nonsense", f"the reward model {self.section.path} gave {list(values)}"))
        if self.section.step_separator is None:
            return Score(values[0])
        return Score(0.0, steps=tuple((end, values[place]) for end, place in reading.steps))

    def _place(self, prompt: Messages, text: str, response: str) -> tuple[int, int] | None:
        """Returns the place where the response begins in the rendered conversation, and how many of its characters are
        there.

        Templates may cut white space off at either end. None where anything else was changed.
        """
        marked = _render(self.tokenizer, [*prompt, {"role": "assistant", "content": MARK}])
        start = marked.find(MARK)
        if start < 0 or not text.startswith(marked[:start]):
            return None
        if text.startswith(response, start):
            return start, len(response)
        if not text.startswith(response.strip(), start):
            return None
        return start - len(response) + len(response.lstrip()), len(response.rstrip())


def step_ends(response: str, separator: str) -> list[int]:
    r"""Returns the number of characters after which each step of a response ends: with the separator, or at the end of
    the response.

    White space alone is no step; a response without any step has one, which ends with it.

    >>> step_ends("a\n\nbc\n\nd", "\n\n"), step_ends("a\n\n", "\n"), step_ends("", "\n")
    ([3, 7, 8], [2], [0])
    """
    ends = [*(found.end() for found in re.finditer(re.escape(separator), response)), len(response)]
    steps = [b for a, b in itertools.pairwise([0, *ends]) if response[a:b].removesuffix(separator).strip()]
    return steps or [len(response)]


def _token_before(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """Returns the token with the last character before this one; the first token where there is none."""
    return next((i for i in reversed(range(len(offsets))) if offsets[i][0] < min(character, offsets[-1][1])), 0)


def _finite(value: float) -> bool:
    return value - value == 0


def make_reward_model(config: RlConfig | EvalConfig, places: Places | None) -> ModelGrader:
    """Makes the reward model of a configuration: in the pool of the role "reward", or in this process.

    Args:
        config: its ``reward.model``.
        places: where the models of the run are; None: in this process, as for an evaluation.

    Raises:
        UserError: see `check_reward_model`; the model cannot be loaded.
    """
    tokenizer, family = check_reward_model(config)
    section = config.reward.model
    assert section is not None
    role = reward_role(config, packing=family in KNOWN)
    scorer = local_reference(role, pick_device(config.run.device)) if places is None else places.reference(role)
    return ModelGrader(scorer, tokenizer, section, padding=padding_of(section.path))


def check_reward_model(config: RlConfig | EvalConfig) -> tuple[PreTrainedTokenizerBase, str]:
    """Checks that the reward model of a configuration fits the run, without reading its weights.

    Returns:
        Its tokenizer, with the template that conversations are rendered with, and its family.

    Raises:
        UserError: there is no model, or none that scores; it has no template that works; its context is too short.
    """
    section = config.reward.model
    assert section is not None, "the configuration was checked: the reward is a model, and there is a section"
    values = classifier_config(section.path, key="reward.model", trust_remote_code=section.trust_remote_code)
    model, tokenizer = load_role(reward_role(config, packing=values.get("model_type") in KNOWN), outline=True)
    context = context_of(model)
    if context is not None and section.max_tokens > context:
        raise UserError(
            f"reward.model.max_tokens is {section.max_tokens}, the context of {section.path} is {context}",
            fix=f"set reward.model.max_tokens={context} or less",
        )
    use_template(tokenizer, section.template, key="reward.model.template")
    try:
        _render(tokenizer, [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}])
    except TemplateError as error:
        raise UserError(
            f"the template of the reward model {section.path} cannot render a conversation: {error}",
            fix="give another one with reward.model.template",
        ) from error
    return tokenizer, str(values.get("model_type"))


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False))
