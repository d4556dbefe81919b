"""A judge whose verdicts a generation engine of this library writes: inline, in this process, or vLLM or SGLang
servers.

It has a tokenizer and a chat template of its own. What the judged model wrote is put into the judge's conversation as
text: the texts of its special tokens are broken up first, so that a response cannot end the judge's turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.chat.template import render_prompt
from hybridflow.config.sections.engine import LocalSection
from hybridflow.config.sections.model import ModelSection
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.config.sections.rewards import (
    EndpointJudgeSection,
    InlineJudgeSection,
    JudgeSection,
    RewardPoolSection,
    ServerJudgeSection,
)
from hybridflow.config.sections.rollout import OwnEngine, RolloutSection, SglangServerSection, VllmServerSection
from hybridflow.config.sections.run import RunSection
from hybridflow.devices import pick_device
from hybridflow.errors import UserError
from hybridflow.models.load import context_of, load_tokenizer, stop_ids
from hybridflow.models.lora import load_trainable
from hybridflow.models.source import model_folder, read_config
from hybridflow.placing.generation import describe_engine, inline_engine, own_engine
from hybridflow.placing.role import Role
from hybridflow.protocols.generation import Request, RolloutEngine, Sampling
from hybridflow.protocols.rewards import Answers, Score
from hybridflow.protocols.waiting import never, returning_when
from hybridflow.rewards.graders.endpoint_judge import EndpointJudge
from hybridflow.rewards.graders.judging import Hearing, Judging, NoVerdict, Verdict, hearing

ModelJudge = InlineJudgeSection | ServerJudgeSection
TIMES = {"start_timeout", "answer_timeout", "restarts"}
SERVER_KEYS = {*TIMES, "python", "tensor_parallel", "engine_args"}


@dataclass(frozen=True, slots=True)
class Started:
    """An engine that holds the judge's model.

    Args:
        engine: it.
        tokenizer: the judge's.
        stops: token ids that end a verdict.
    """

    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]


class EngineJudge:
    """A `protocols.rewards.Grader` whose judge is a model that an engine of this run holds.

    Requests go to the engine when responses are submitted. The inline engine computes inside `wait` alone.

    Args:
        section: ``reward.judge``.
        start: starts the engine; called once, before the first verdict.
        require: raises a UserError where it could not be started, without starting it.
        seed: of the run.

    Raises:
        UserError: see `rewards.graders.judging.Judging`.
    """

    def __init__(
        self, section: ModelJudge, start: Callable[[], Started], require: Callable[[], object], *, seed: int
    ) -> None:
        self.section, self.judging = section, Judging(section, seed)
        self._start, self._require = start, require
        self.should_return: Callable[[], bool] = never
        self._started: Started | None = None
        self._open: dict[int, Hearing] = {}
        self._asked: dict[int, tuple[int, str, int]] = {}  # by the engine's handle: key, what was asked, sample

    def submit(self, key: int, answers: Answers, function: str | None = None) -> None:
        """See `protocols.rewards.Grader.submit`.

        Raises:
            UserError: the engine cannot be started.
        """
        assert key not in self._open, f"key {key} is in use"
        if self._started is None:
            self._started = self._start()
        opened = self._open[key] = hearing(self.judging, answers)
        for asked, sample in sorted(opened.missing):
            try:
                handle = self._started.engine.submit(self._request(asked, sample))
            except NoVerdict as error:
                opened.tell(asked, sample, error)
            else:
                self._asked[handle] = (key, asked, sample)
        self._take()

    def ready(self) -> list[tuple[int, list[Score]]]:
        """See `protocols.rewards.Grader.ready`."""
        self._take()
        return self._heard()

    def wait(self) -> list[tuple[int, list[Score]]]:
        """See `protocols.rewards.Grader.wait`."""
        done = self.ready()
        while not done and self._open and not self.should_return():
            self._take(wait=True)
            done = self._heard()
        return done

    def cancel(self) -> None:
        """See `protocols.rewards.Grader.cancel`."""
        if self._started is not None and self._asked:
            self._started.engine.abort(list(self._asked))
        self._asked.clear()
        self._open.clear()

    def check(self) -> None:
        """See `protocols.rewards.Grader.check`. The engine is started with the first response.

        Raises:
            UserError: the model or the engine cannot be used.
        """
        self._require()

    def close(self) -> None:
        """See `protocols.rewards.Grader.close`."""
        self.cancel()
        if self._started is not None:
            self._started.engine.close()
            self._started = None

    def _request(self, asked: str, sample: int) -> Request:
        assert self._started is not None
        section, tokenizer = self.section, self._started.tokenizer
        ids = render_prompt(tokenizer, as_text(tokenizer, asked))[1]
        if len(ids) > section.max_prompt_tokens:
            raise NoVerdict(
                f"the question to it has {len(ids)} tokens, more than reward.judge.max_prompt_tokens "
                f"({section.max_prompt_tokens})",
                "refused",
            )
        sampling = Sampling(section.max_tokens, section.temperature, self._started.stops)
        return Request(tuple(ids), sampling, self.judging.key(asked, sample))

    def _take(self, *, wait: bool = False) -> None:
        """Hands on what the engine has finished; only an engine outside of this process works without `wait`."""
        if not self._asked:
            return
        assert self._started is not None
        engine, tokenizer = self._started.engine, self._started.tokenizer
        with returning_when(self.should_return, engine):
            results = engine.wait() if wait else engine.poll()
        for result in results:
            key, asked, sample = self._asked.pop(result.handle)
            text = str(tokenizer.decode(result.token_ids, skip_special_tokens=True))
            self._open[key].tell(asked, sample, Verdict(text, result.finish_reason == "length"))

    def _heard(self) -> list[tuple[int, list[Score]]]:
        keys = [key for key, opened in self._open.items() if not opened.missing]
        return [(key, self._open.pop(key).scores()) for key in keys]


def as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Returns the text with the names of special tokens broken up: the tokenizer would read them as these tokens."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    for name in sorted((name for name in special if len(name) > 1), key=len, reverse=True):
        text = text.replace(name, f"{name[0]} {name[1:]}")
    return text


def make_judge(
    section: JudgeSection,
    pool: RewardPoolSection,
    run: RunSection,
    rollout: RolloutSection,
    note: Callable[[str, str], None] | None,
) -> EndpointJudge | EngineJudge:
    """Makes the judge of ``reward.judge``.

    Args:
        section: which judge.
        pool: how many questions an endpoint is sent at once.
        run: its seed, its device and its folder.
        rollout: how the run's own engine is started, for what the judge's section does not say.
        note: is called with (kind, text) for events of the engine's processes; None: events are dropped.

    Raises:
        UserError: the template, the parser or the key is missing. `check` finds other mistakes.
    """
    if isinstance(section, EndpointJudgeSection):
        return EndpointJudge(section, pool, seed=run.seed)
    start: Callable[[], Started]
    if section.engine == "inline":
        started_by, start = None, functools.partial(_inline, run, section)
    else:
        started_by = _generation(section, rollout)
        start = functools.partial(_server, run, section, started_by, note)
    return EngineJudge(section, start, functools.partial(_require, run, section, started_by), seed=run.seed)


def _require(run: RunSection, section: ModelJudge, started_by: OwnEngine | None) -> None:
    _tokenizer(run, section)
    if ".py:" in section.path and section.engine != "inline":
        raise UserError(
            f"reward.judge.path is {section.path}, a function, and {section.engine} starts from a folder",
            fix="set reward.judge.engine=inline, or give the folder of a model",
        )
    _load(run, section, outline=True)
    if started_by is not None:
        describe_engine(started_by)


def _inline(run: RunSection, section: ModelJudge) -> Started:
    model, tokenizer = _load(run, section), _tokenizer(run, section)
    model.to(pick_device(run.device)).requires_grad_(False)
    return Started(inline_engine(model, tokenizer), tokenizer, stop_ids(model, tokenizer))


def _load(run: RunSection, section: ModelJudge, *, outline: bool = False) -> PreTrainedModel:
    model, _ = load_trainable(ModelSection(path=section.path), seed=run.seed, outline=outline)
    context = context_of(model)
    if context is not None and _longest(section) > context:
        raise UserError(
            f"a verdict can need {_longest(section)} tokens, the judge's context is {context}",
            why="reward.judge.max_prompt_tokens + reward.judge.max_tokens",
            fix="lower one of them, or take a judge with a longer context",
        )
    return model


def _server(
    run: RunSection,
    section: ServerJudgeSection,
    started_by: OwnEngine,
    note: Callable[[str, str], None] | None,
) -> Started:
    tokenizer, folder = _tokenizer(run, section), model_folder(section.path)
    role = Role(
        name="reference",  # it is never trained
        model=ModelSection(path=str(folder)),
        engine=LocalSection(),
        optim=None,
        tokens_per_microbatch=_longest(section),
        longest=_longest(section),
        seed=run.seed,
    )
    logs = Path(run.folder) / "judge"
    logs.mkdir(parents=True, exist_ok=True)
    engine = own_engine(role, started_by, PlacementSection(), folder, run_folder=logs, note=note)
    named: Any = read_config(folder, "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    more = named.get("eos_token_id") or []
    stops = {int(tokenizer.eos_token_id), *(more if isinstance(more, list) else [more])}
    return Started(engine, tokenizer, tuple(sorted(stops)))


def _generation(section: ServerJudgeSection, r: RolloutSection) -> OwnEngine:
    """Returns the settings that start a server with the judge; the run's engine gives the times and environments that
    the judge's section leaves out.
    """
    own = VllmServerSection if section.engine == "vllm" else SglangServerSection
    given = section.model_dump(include={"engine", *SERVER_KEYS}, exclude_none=True)
    if r.engine != "inline":
        given = r.model_dump(include=TIMES) | given
    if r.engine == section.engine:
        given = r.model_dump(include={"python"}) | given
    return own.model_validate(given | {"mode": "server"})


def _tokenizer(run: RunSection, section: ModelJudge) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(section.path, seed=run.seed)
    if not tokenizer.chat_template:
        raise UserError(
            f"the judge {section.path} has no chat template",
            why="what it is asked is a message to it",
            fix="take a model that was taught to follow instructions, or save its tokenizer with a chat_template",
        )
    return tokenizer


def _longest(section: ModelJudge) -> int:
    return section.max_prompt_tokens + section.max_tokens
