"""The source of finished groups: draws prompts, generates, scores each group as it completes, journals it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from hybridflow.errors import UserError
from hybridflow.faults import fault_point
from hybridflow.noise import NoiseKey
from hybridflow.protocols import Group, Request, Result, RolloutEngine, Sampling, Trajectory


class Question(Protocol):
    """What a prompt must offer (`data.prompts.Prompt` does)."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The rendered prompt."""
        ...

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt as chat messages."""
        ...

    @property
    def ground_truth(self) -> Any:
        """What the reward compares with."""
        ...

    @property
    def row(self) -> dict[str, Any]:
        """The whole row."""
        ...


class GroupStore(Protocol):
    """What a journal must offer (`checkpoint.journal.Journal` does)."""

    def append(self, step: int, group: Group) -> None:
        """Keeps a finished group."""
        ...

    def read(self, step: int) -> dict[int, Group]:
        """The groups kept for a step, by draw."""
        ...

    def mend(self, step: int) -> None:
        """Makes a step's store whole after a kill."""
        ...


class Stopped(Exception):
    """Generation ended early because the run was asked to stop; nothing of the step has been trained on."""


Reward = Callable[..., Sequence[float | Mapping[str, float]]]
GREEDY = -1  # stands for the number of the greedy answer among the samples


class GroupSource:
    """Generates and scores groups of answers.

    Args:
        engine: where answers come from.
        question: the prompt of a row index.
        reward: called as ``reward(responses, ground_truth=, prompt=, row=)``; it gives a number for each response, or
            numbers by name, of which "score" is the reward.
        decode: token ids to text.
        sampling: how answers are drawn.
        samples: answers per prompt.
        greedy: whether every prompt is answered once more, greedily, for a baseline.
        seed: the run's seed.
        journal: where finished groups are kept; None keeps none.
        whole_step: a step whose groups are partly journaled is generated again as a whole, so that every sequence is
            computed in the company it had (the inline engine's log-probs then repeat bit for bit); otherwise only what
            is missing. Journaled groups are used as they are either way, and never scored twice.
        should_stop: asked between completions; True ends the step with `Stopped`.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        question: Callable[[int], Question],
        reward: Reward,
        *,
        decode: Callable[[list[int]], str],
        sampling: Sampling,
        samples: int,
        seed: int,
        greedy: bool = False,
        journal: GroupStore | None = None,
        whole_step: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.engine, self.question, self.reward, self.decode = engine, question, reward, decode
        self.sampling, self.seed = sampling, seed
        self.samples = [*range(samples), *([GREEDY] if greedy else [])]
        self.journal, self.whole_step, self.should_stop = journal, whole_step, should_stop
        self.reward_seconds = 0.0
        self._kept: list[Result] = []

    def keep(self, results: Sequence[Result]) -> None:
        """Takes results of this source that somebody else got from the engine while it waited for its own."""
        self._kept += results

    def collect(self, step: int, draws: Sequence[tuple[int, int]]) -> list[Group]:
        """The groups of these (draw, row) pairs, in their order.

        Args:
            step: the step they are for.
            draws: what the sampler gave.

        Raises:
            Stopped: the run was asked to stop.
            UserError: the reward failed, log-probabilities are not finite, or the journal holds answers to other
                prompts.
        """
        self.reward_seconds = 0.0
        done: dict[int, Group] = {}
        if self.journal is not None:
            self.journal.mend(step)
            done = self.journal.read(step)
        for draw, row in draws:
            if draw in done and (done[draw].row, done[draw].prompt_ids) != (row, list(self.question(row).token_ids)):
                raise UserError(
                    f"the journal of step {step} was written with other data: its prompt of row {row} differs",
                    why="going on would train on answers to prompts that are not in the data",
                    fix="restore the data, or choose another run.folder",
                )
        missing = [d for d in draws if d[0] not in done]
        again = list(draws) if missing and self.whole_step else missing
        questions = {draw: self.question(row) for draw, row in again}
        rows = dict(again)
        owner: dict[int, tuple[int, int]] = {}
        for draw, _ in again:
            for sample in self.samples:
                owner[self.engine.submit(self._request(questions[draw], draw, sample))] = (draw, sample)
        arrived: dict[int, dict[int, Result]] = {draw: {} for draw, _ in again}
        journaled = len(done)  # of the step: a filter may ask for more groups of it
        while owner:
            if self.should_stop():
                self.engine.abort(list(owner))
                raise Stopped
            arriving, self._kept = self._kept or self.engine.wait(), []
            for result in arriving:
                draw, sample = owner.pop(result.handle)
                arrived[draw][sample] = result
                if len(arrived[draw]) == len(self.samples) and draw not in done:
                    done[draw] = self._score(draw, rows[draw], questions[draw], arrived.pop(draw))
                    if self.journal is not None:
                        self.journal.append(step, done[draw])
                    journaled += 1
                    fault_point("group", step, journaled)
        return [done[draw] for draw, _ in draws]

    def _request(self, question: Question, draw: int, sample: int) -> Request:
        if sample != GREEDY:
            return Request(question.token_ids, self.sampling, NoiseKey(self.seed, "train", draw, sample))
        greedy = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
        return Request(question.token_ids, greedy, NoiseKey(self.seed, "greedy", draw))

    def _score(self, draw: int, row: int, question: Question, results: dict[int, Result]) -> Group:
        if not all(math.isfinite(logp) for result in results.values() for logp in result.logps):
            raise UserError(
                f"the log-probabilities of an answer to row {row} of the training data are not finite",
                why="the model's weights hold numbers that are not finite, or rollout.temperature is far too small",
                fix="look at model.path, or go on from an earlier checkpoint with a lower optim.lr",
            )
        began = time.perf_counter()
        greedy = results.pop(GREEDY, None)
        texts = [self.decode(results[i].token_ids) for i in range(len(results))]
        answers = []
        for i, (text, (reward, components)) in enumerate(zip(texts, self._rewards(texts, question, row))):
            r = results[i]
            answers.append(
                Trajectory(
                    i, r.token_ids, r.logps, r.finish_reason, r.spans, text, reward, r.support, components=components
                )
            )
        # Scored apart: a reward that looks at the whole group must not see the answer that it is held against.
        baseline = None if greedy is None else self._rewards([self.decode(greedy.token_ids)], question, row)[0][0]
        self.reward_seconds += time.perf_counter() - began
        return Group(draw, row, list(question.token_ids), answers, baseline)

    def _rewards(self, texts: list[str], question: Question, row: int) -> list[tuple[float, dict[str, float]]]:
        """The reward of each text, and its components."""
        try:
            found = self.reward(texts, ground_truth=question.ground_truth, prompt=question.messages, row=question.row)
        except UserError as error:
            raise UserError(f"row {row} of the training data: {error.what}", why=error.why, fix=error.fix) from error
        return [
            (r["score"], {n: v for n, v in r.items() if n != "score"}) if isinstance(r, Mapping) else (r, {})
            for r in found
        ]
