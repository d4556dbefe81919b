"""Held-out evaluation: generates responses to fixed prompts, scores them by the run's reward, and measures the
uncertainty of the result.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.config.locate import load_function
from hybridflow.config.sections.eval import EvalSection
from hybridflow.data.prompts import Prompt, PromptSet
from hybridflow.errors import UserError, raised
from hybridflow.evaluation.statistics import maj_at_k, mean_interval, pass_at_k
from hybridflow.groups.answering import Answering
from hybridflow.groups.driving import Driver
from hybridflow.groups.failures import FailurePolicy, failed_trajectory, require_most
from hybridflow.groups.source import answers_of, require_finite
from hybridflow.noise import NoiseKey
from hybridflow.protocols.episodes import Start
from hybridflow.protocols.generation import Sampling
from hybridflow.protocols.groups import Group, Trajectory
from hybridflow.protocols.rewards import Score, score_all, total
from hybridflow.protocols.waiting import Stopped, returning_when
from hybridflow.tracking.rollouts import sequence_columns

SECONDS_BETWEEN_NOTES = 10.0


@dataclass(frozen=True, slots=True)
class Measure:
    """One number of an evaluation.

    Args:
        source: the data source.
        name: ``mean@4``, ``pass@2``, ``maj@4/mean``.
        value: mean over the source's prompts.
        low: lower end of the 95 % confidence interval.
        high: upper end.
        method: of the interval: see `statistics.mean_interval`.
        prompts: how many there are.
    """

    source: str
    name: str
    value: float
    low: float
    high: float
    method: str
    prompts: int

    @property
    def key(self) -> str:
        """The metric's name, verl's."""
        return f"val-core/{self.source}/reward/{self.name}"


@dataclass(slots=True)
class Evaluation:
    """The results of an evaluation.

    Args:
        measures: all of one data source, then those of the next.
        others: ``response_length`` metrics of each source, and how many of its responses the reward failed on.
        records: a row for each sequence of each response, for `tracking.rollouts`; ``step`` and ``tokens`` are not in
            it.
        prompts: the number of prompts.
    """

    measures: list[Measure]
    others: dict[str, float]
    records: list[dict[str, Any]]
    prompts: int

    def metrics(self) -> dict[str, float]:
        """Returns all numbers by name: ``val-core/...`` for the values; ``val-aux/.../ci_low`` and ``ci_high`` beside
        them.
        """
        found = {m.key: m.value for m in self.measures}
        for m in self.measures:
            aside = m.key.replace("val-core/", "val-aux/", 1)
            found |= {f"{aside}/ci_low": m.low, f"{aside}/ci_high": m.high}
        return found | self.others


def sampling_for(section: EvalSection, training: Sampling) -> Sampling:
    """Returns how evaluation draws tokens: by its own section; where responses end is as in training."""
    return replace(
        training,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        min_p=section.min_p,
        repetition_penalty=section.repetition_penalty,
        logit_bias=tuple(sorted(section.logit_bias.items())),
    )


def evaluate(
    answering: Answering,
    prompts: PromptSet,
    section: EvalSection,
    *,
    sampling: Sampling,
    seed: int,
    note: Callable[[str], None] | None = None,
) -> Evaluation:
    """Generates and scores ``eval.samples_per_prompt`` responses to every prompt.

    Greedy responses take no noise; sampled ones take that of the stream "eval", by row and sample. Neither is ever the
    training's, and two models that are evaluated with one seed get the same.

    Args:
        answering: generates and scores; its engine holds the weights to evaluate. Unless its policy ends the evaluation
            where the reward fails, such a response gets the failure policy's value, and is counted. So does a
            trajectory that failed before it had a reward, unless `Answering.on_failed` is "fail".
        prompts: the evaluation set.
        section: how many rows and responses, and what is measured.
        sampling: what `sampling_for` gave.
        seed: the run's seed.
        note: takes a line about the progress, every 10 seconds.

    Raises:
        Stopped: `Answering.should_stop` returned True. The responses are dropped: an evaluation is complete, or there
            is none.
        UserError: the reward or ``eval.answer`` failed on a response, a trajectory or most of them failed, or the
            model's numbers are not finite.
    """
    engine, grader, should_stop = answering.engine, answering.grader, answering.should_stop
    if section.answer is not None:
        load_function(section.answer)  # a mistake in it is raised before anything is generated
    count = len(prompts) if section.max_rows is None else min(section.max_rows, len(prompts))
    asked, n = [prompts[i] for i in range(count)], section.samples_per_prompt
    stream = "eval" if sampling.temperature else "greedy"
    starts = [
        Start(NoiseKey(seed, stream, i, sample), p, sampling, "environment/eval")
        for i, p in enumerate(asked)
        for sample in range(n)
    ]
    rewards: dict[str, list[list[float]]] = defaultdict(list)
    votes: dict[str, list[list[str]]] = defaultdict(list)
    records = []
    counts: dict[str, float] = defaultdict(float)
    with returning_when(should_stop, engine, grader):
        answers = _answers(Driver(engine, answering.rollouts), starts, note, should_stop)
    by_row = [answers[i * n : (i + 1) * n] for i in range(count)]
    scored = _require_sound(by_row, answering.on_failed)
    asked_of = (answers_of(p, found, answering.decode) for p, found in zip(asked, scored) if found)
    with returning_when(should_stop, engine, grader):
        scores_of = iter(score_all(grader, asked_of, should_stop))
    for i, prompt in enumerate(asked):
        scores = next(scores_of) if scored[i] else []
        found = [_value(score, answering.policy, f"row {i} of the evaluation data") for score in scores]
        of_scored = iter(found)
        values = [next(of_scored) if t.failure is None else answering.policy.value for t in by_row[i]]
        name = f"val-aux/{prompt.data_source}"
        counts[f"{name}/reward_failures"] += sum(score.failure is not None for score in scores)
        if answering.on_failed != "fail":  # of an agent
            counts[f"{name}/failed_trajectories"] += n - len(scores)
        said_in = [t.final if t.messages else t.response for t in by_row[i]]
        voted = [vote_in(text, section.answer) for text in said_in]
        rewards[prompt.data_source].append(values)
        votes[prompt.data_source].append(voted)
        for sample, (t, value, said) in enumerate(zip(by_row[i], values, voted)):
            same = {"draw": i, "sample": sample, "reward": value, "vote": said}
            records += [record | same for record in _records(prompt, t, prompts.tokenizer)]
    measures = [m for source in rewards for m in measure(source, rewards[source], votes[source], section, seed)]
    return Evaluation(measures, _lengths(asked, by_row) | dict(counts), records, count)


def measure(
    source: str, rewards: Sequence[Sequence[float]], votes: Sequence[Sequence[str]], section: EvalSection, seed: int
) -> Iterator[Measure]:
    """Yields the numbers of one data source.

    Args:
        source: its name.
        rewards: for every prompt, the rewards of its responses.
        votes: for every prompt, the answers as `maj_at_k` counts them.
        section: what is measured.
        seed: of the intervals' resamples.
    """
    n = section.samples_per_prompt
    for name in section.metric_names():
        kind, _, k = name.removesuffix("/mean").partition("@")
        if kind == "mean":
            values = [sum(r) / n for r in rewards]
        elif kind == "pass":
            passed = [sum(value >= section.success_threshold for value in r) for r in rewards]
            values = [pass_at_k(n, c, int(k)) for c in passed]
        else:
            values = [maj_at_k(v, r, int(k)) for v, r in zip(votes, rewards)]
        (low, high), method = mean_interval(values, NoiseKey(seed, f"interval/{source}/{name}"))
        yield Measure(source, name, math.fsum(values) / len(values), low, high, method, len(values))


def vote_in(response: str, reference: str | None) -> str:
    """Returns the answer in a response that counts as a vote: what ``eval.answer`` finds in it, else all of it.

    Raises:
        UserError: no such function, or it raised.
    """
    if reference is None:
        return response.strip()
    function = load_function(reference)
    try:
        return str(function(response))
    except Exception as error:
        raise UserError(
            f"eval.answer {reference} raised {raised(error)}",
            why=f"it was given {response[:200]!r}",
            fix="make it return the answer in a response as text, and something such as '' where there is none",
        ) from error


def never_ended(finish_reasons: Sequence[str], limit: int, eos: str) -> str | None:
    """Returns advice where no response of several ended before the limit; None where one did."""
    count = len(finish_reasons)
    if count < 2 or any(reason != "length" for reason in finish_reasons):
        return None
    return (
        f"{eos} was never generated: {count} of {count} responses ended at the length limit of {limit} tokens; raise "
        f"rollout.max_response_tokens if they need more, else see that the chat template ends responses with {eos} and "
        "that the model was trained on responses that end so"
    )


def _answers(
    driver: Driver, starts: Sequence[Start], note: Callable[[str], None] | None, should_stop: Callable[[], bool]
) -> list[Trajectory]:
    """Returns the trajectories, in the order of their starts."""
    numbers = [driver.begin(start) for start in starts]
    done: dict[int, Trajectory] = {}
    began = told = time.monotonic()
    while driver.running:
        try:
            done.update(driver.advance())
        except KeyboardInterrupt:
            if note is not None:
                note(f"stopped after {len(done)} of {len(numbers)} responses: an incomplete evaluation is not kept")
            raise
        if should_stop():
            driver.stop()
            raise Stopped
        now = time.monotonic()
        if note is not None and done and now - told > SECONDS_BETWEEN_NOTES and len(done) < len(numbers):
            left = (now - began) / len(done) * (len(numbers) - len(done))
            note(f"evaluation: {len(done)} of {len(numbers)} responses, about {left:.0f} s left")
            told = now
    return [done[number] for number in numbers]


def _require_sound(by_row: Sequence[list[Trajectory]], on_failed: str) -> list[list[Trajectory]]:
    """Returns the trajectories of each row that did not fail, and have a reward to get."""
    for i, found in enumerate(by_row):
        where = f"row {i} of the evaluation data"
        require_finite((t.logps for t in found), where, "eval.temperature")
        for t in found:
            if t.failure is not None and on_failed == "fail":
                raise failed_trajectory(t, where)
    failed = [[t.failure for t in found if t.failure is not None] for found in by_row]
    groups = [Group(i, i, [], [], failed=reasons) for i, reasons in enumerate(failed)]
    require_most(groups, sum(map(len, by_row)), "the evaluation")
    return [[t for t in found if t.failure is None] for found in by_row]


def _value(score: Score, policy: FailurePolicy, where: str) -> float:
    if score.failure is None:
        return total(score)
    if policy.on_failure == "fail":
        raise policy.refuse(score.failure, where)
    return policy.value


def _records(prompt: Prompt, t: Trajectory, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    asked = [m["content"] for m in prompt.messages if m["role"] == "user"]
    question = asked[-1] if asked else prompt.text
    same = {
        "data_source": prompt.data_source,
        "response": t.response,
        "question": question if isinstance(question, str) else json.dumps(question, default=str),
        "advantage": None,
        "finish_reason": t.finish_reason,
        "ground_truth": "" if prompt.ground_truth is None else str(prompt.ground_truth),
    }
    found = []
    for columns in sequence_columns(t):
        shown = columns["prompt_ids"]
        text = prompt.text if shown == list(prompt.token_ids) else str(tokenizer.decode(shown))
        found.append(same | {"prompt": text} | columns)
    return found


def _lengths(prompts: Sequence[Prompt], trajectories: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    of_source: dict[str, list[Trajectory]] = defaultdict(list)
    for prompt, of_prompt in zip(prompts, trajectories):
        of_source[prompt.data_source] += of_prompt
    found = {}
    for source, of_one in of_source.items():
        cut = sum(t.finish_reason == "length" for t in of_one)
        found[f"val-aux/{source}/response_length/mean"] = sum(t.length for t in of_one) / len(of_one)
        found[f"val-aux/{source}/response_length/clip_ratio"] = cut / len(of_one)
    return found
