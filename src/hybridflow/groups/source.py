"""The source of finished groups: draws prompts, generates, scores each group as it completes, journals it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from hybridflow.errors import UserError
from hybridflow.faults import fault_point
from hybridflow.groups.answering import Answering
from hybridflow.groups.driving import Driver
from hybridflow.groups.failures import failed_trajectory, require_most, require_one_beginning
from hybridflow.groups.playback import Playback, Recorded
from hybridflow.noise import NoiseKey
from hybridflow.protocols.episodes import Question, Start
from hybridflow.protocols.generation import Result, Sampling
from hybridflow.protocols.groups import Group, TokenSequence, Trajectory
from hybridflow.protocols.rewards import Answers, Score, total
from hybridflow.protocols.waiting import Stopped, returning_when


class GroupStore(Protocol):
    """What a journal must offer (`checkpoint.journal.Journal` does)."""

    def append(self, step: int, group: Group) -> None:
        """Keeps a finished group."""
        ...

    def read(self, step: int) -> dict[int, Group]:
        """Returns the groups kept for a step, by draw."""
        ...

    def mend(self, step: int) -> None:
        """Makes a step's store whole after a kill."""
        ...


GREEDY = -1  # stands for the number of the greedy response among the samples


class GroupSource:
    """Generates and scores groups of responses.

    Args:
        answering: generates and scores.
        question: the prompt of a row index.
        sampling: how responses are drawn.
        samples: responses per prompt.
        greedy: whether every prompt gets one more response, greedy, for a baseline.
        seed: the run's seed.
        tell: takes a sentence about the first response that the reward failed on in each way, where the run continues.
        journal: where finished groups are kept; None keeps none.
        whole_step: a step whose groups are partly journaled is generated again as a whole, so that every sequence is
            computed in the same batch as before (the inline engine's log-probs then repeat bit for bit); otherwise only
            what is missing. Journaled groups are used as they are either way, and never scored twice.
    """

    def __init__(
        self,
        answering: Answering,
        question: Callable[[int], Question],
        *,
        sampling: Sampling,
        samples: int,
        seed: int,
        greedy: bool = False,
        tell: Callable[[str], None] = lambda text: None,
        journal: GroupStore | None = None,
        whole_step: bool = True,
    ) -> None:
        self.answering, self.question = answering, question
        self.engine, self.grader, self.decode = answering.engine, answering.grader, answering.decode
        self.playback = Playback(answering.rollouts)
        self.driver = Driver(answering.engine, self.playback)
        self.policy, self.should_stop = answering.policy, answering.should_stop
        self.sampling, self.seed = sampling, seed
        self.samples = [*range(samples), *([GREEDY] if greedy else [])]
        self.journal, self.whole_step = journal, whole_step
        self.tell = tell
        self._told: set[str] = set()
        self.reward_seconds = 0.0
        self._submitted = 0
        # What was submitted to the grader, by its key: the draw, and whether it is the greedy response to it.
        self._asked: dict[int, tuple[int, bool]] = {}

    def keep(self, results: Sequence[Result]) -> None:
        """Takes results of this source that another caller got from the engine while it waited for its own."""
        self.driver.keep(results)

    def collect(self, step: int, draws: Sequence[tuple[int, int]]) -> list[Group]:
        """Returns the groups of these (draw, row) pairs, in their order; one that the policy drops has no trajectories.

        Args:
            step: the step they are for.
            draws: what the sampler gave.

        Raises:
            Stopped: the run was asked to stop.
            UserError: the reward failed, log-probabilities are not finite, or the journal holds responses to other
                prompts.
        """
        with returning_when(self.should_stop, self.engine, self.grader):
            return self._collect(step, draws)

    def _collect(self, step: int, draws: Sequence[tuple[int, int]]) -> list[Group]:
        self.reward_seconds = 0.0
        done: dict[int, Group] = {}
        if self.journal is not None:
            self.journal.mend(step)
            done = self.journal.read(step)
        for draw, row in draws:
            if draw in done and not _is_of(done[draw], row, self.question(row)):
                raise UserError(
                    f"the journal of step {step} was written with other data: its prompt of row {row} differs",
                    why="resuming would train on responses to prompts that are not in the data",
                    fix="restore the data, or choose another run.folder",
                )
        missing = [d for d in draws if d[0] not in done]
        again = list(draws) if missing and self.whole_step else missing
        questions = {draw: self.question(row) for draw, row in again}
        self.playback.recorded = {} if not missing else recorded_of(done.values())
        rows = dict(again)
        owner: dict[int, tuple[int, int]] = {}
        for draw, _ in again:
            for sample in self.samples:
                owner[self.driver.begin(self._start(questions[draw], draw, sample))] = (draw, sample)
        arrived: dict[int, dict[int, Trajectory]] = {draw: {} for draw, _ in again}
        scoring: dict[int, _Scoring] = {}
        journaled = len(done)  # of the step: a filter may request more groups of it
        while self.driver.running or scoring:
            if self.should_stop():
                self.driver.stop()
                self.grader.cancel()
                self._asked.clear()
                raise Stopped
            for number, trajectory in self.driver.advance() if self.driver.running else []:
                draw, sample = owner.pop(number)
                arrived[draw][sample] = trajectory
                if len(arrived[draw]) == len(self.samples) and draw not in done:
                    scoring[draw] = self._submit(draw, rows[draw], questions[draw], arrived.pop(draw))
            for draw in self._scored(scoring, wait=not self.driver.running):
                done[draw] = self._group(draw, rows[draw], questions[draw], scoring.pop(draw))
                if self.journal is not None:
                    self.journal.append(step, done[draw])
                journaled += 1
                fault_point("group", step, journaled)
        groups = [done[draw] for draw, _ in draws]
        require_most(groups, len(groups) * len(self.samples))
        return groups

    def _start(self, question: Question, draw: int, sample: int) -> Start:
        if sample != GREEDY:
            return Start(NoiseKey(self.seed, "train", draw, sample), question, self.sampling)
        greedy = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
        return Start(NoiseKey(self.seed, "greedy", draw), question, greedy)

    def _submit(self, draw: int, row: int, question: Question, trajectories: dict[int, Trajectory]) -> _Scoring:
        """Submits a finished group to the grader."""
        where = f"row {row} of the training data"
        require_finite((t.logps for t in trajectories.values()), where, "rollout.temperature")
        require_one_beginning(trajectories.values(), where)
        began = time.perf_counter()
        greedy = trajectories.pop(GREEDY, None)
        group = _Scoring([trajectories[i] for i in range(len(trajectories))])

        def ask(asked: list[Trajectory], *, baseline: bool) -> None:
            self._asked[self._submitted] = draw, baseline
            self.grader.submit(self._submitted, answers_of(question, asked, self.decode))
            self._submitted += 1
            group.lacking += 1

        group.greedy = greedy.sequences if greedy is not None and greedy.messages else []
        failed = [t for t in (*group.trajectories, greedy) if t is not None and t.failure is not None]
        if failed and self.answering.on_failed == "fail":
            raise failed_trajectory(failed[0], where)
        group.failed = [str(t.failure) for t in failed]
        if failed and (self.answering.on_failed == "drop_group" or failed[-1] is greedy):
            group.left_out, group.trajectories = group.trajectories, []
            return group
        if group.scored:
            ask(group.scored, baseline=False)
        if greedy is not None:
            # Scored apart: a reward that reads the whole group must not see the response that it is compared with.
            ask([greedy], baseline=True)
        self.reward_seconds += time.perf_counter() - began
        return group

    def _scored(self, scoring: dict[int, _Scoring], *, wait: bool) -> list[int]:
        """Returns the draws whose scores are complete; waits for one if there is nothing else to do."""
        began = time.perf_counter()
        whole = [draw for draw, group in scoring.items() if not group.lacking]  # nothing of them is to be scored
        for key, scores in self.grader.wait() if wait and scoring else self.grader.ready():
            draw, baseline = self._asked.pop(key)
            group = scoring[draw]
            group.lacking -= 1
            if baseline:
                (group.baseline,) = scores
            else:
                group.scores = scores
            if not group.lacking:
                whole.append(draw)
        self.reward_seconds += time.perf_counter() - began
        return whole

    def _group(self, draw: int, row: int, question: Question, found: _Scoring) -> Group:
        """Makes a group of the scored responses, after the failure policy was applied to those that failed."""
        every = [*found.scores, *([] if found.baseline is None else [found.baseline])]
        failed = [score.failure for score in every if score.failure is not None]
        kinds = dict(Counter(f.kind for f in failed))
        prompt_ids = list(question.token_ids) or found.prompt_ids
        group = Group(draw, row, prompt_ids, [], failures=kinds, failed=found.failed, digest=_digest(question))
        policy = self.policy
        if failed and policy.on_failure == "fail":
            raise policy.refuse(failed[0], f"row {row} of the training data")
        for failure in failed:
            if failure.kind not in self._told:
                self._told.add(failure.kind)
                self.tell(f"row {row} of the training data: {failure}; reward.on_failure is {policy.on_failure}")
        if found.baseline is not None:
            group.baseline = total(found.baseline) if found.baseline.failure is None else policy.value
        baseline_failed = found.baseline is not None and found.baseline.failure is not None
        if failed and (policy.on_failure == "drop_group" or (policy.on_failure == "mask" and baseline_failed)):
            group.left_out, group.greedy = [t for t in found.trajectories if t.messages], found.greedy
            return group  # without its baseline a response has nothing to be compared with
        names = {name for score in found.scores for name in score.components}
        for t, score in zip(found.scored, found.scores):
            valued = score.failure is not None and policy.on_failure == "value"
            t.reward = total(score) if score.failure is None else policy.value
            t.components = dict.fromkeys(sorted(names), policy.value) if valued else dict(score.components)
            t.failure = str(score.failure) if score.failure is not None and policy.on_failure == "mask" else None
            self._set_step_rewards(t, score)
        group.trajectories, group.greedy, group.left_out = found.trajectories, found.greedy, found.left_out
        return group

    def _set_step_rewards(self, t: Trajectory, score: Score) -> None:
        """Puts the rewards of a response's parts on tokens: each on the first one with which the text is as long as
        the part ends.
        """
        ends = [(sequence, turn) for sequence in t.sequences for turn in sequence.turns]
        for number, reward in score.turns:
            sequence, turn = ends[number]
            sequence.step_rewards.append((turn.end - 1, reward))
        for characters, reward in score.steps:
            for sequence, turn in ends:  # turns stand one after the other in the response, with a newline between
                token_ids = sequence.token_ids[turn.start : turn.end]
                length = len(self.decode(token_ids))
                if characters <= length or (sequence, turn) == ends[-1]:
                    break
                characters = max(characters - length - 1, 1)
            low, high = 1, len(token_ids)  # the length of the text grows with the tokens: a binary search
            while low < high:
                middle = (low + high) // 2
                if len(self.decode(token_ids[:middle])) >= min(characters, length):
                    high = middle
                else:
                    low = middle + 1
            sequence.step_rewards.append((turn.start + low - 1, reward))


def recorded_of(groups: Iterable[Group]) -> Recorded:
    """Returns the sequences of journaled trajectories in which the model acted, for `Playback`."""
    every = [(g.draw, t) for g in groups for t in (*g.trajectories, *g.left_out)]
    found = {("train", draw, t.sample): t.sequences for draw, t in every if t.messages or t.finish_reason == "failed"}
    return found | {("greedy", g.draw, 0): g.greedy for g in groups if g.greedy}


def answers_of(question: Question, trajectories: Sequence[Trajectory], decode: Callable[[list[int]], str]) -> Answers:
    """Returns what a grader scores: the responses of trajectories, and their turns where the model acted."""
    q, texts, ids = question, [t.response for t in trajectories], [t.token_ids for t in trajectories]
    answers = Answers(texts, q.ground_truth, q.messages, q.row, q.written, ids)
    if not any(t.messages for t in trajectories):
        return answers
    return replace(
        answers,
        finals=[t.final for t in trajectories],
        conversations=[t.messages for t in trajectories],
        turns=[_turns(t, decode) for t in trajectories],
    )


def _turns(t: Trajectory, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    """Returns the turns of a trajectory as rewards see them: text, the environment's reward, number of calls."""
    ends = [(s.token_ids[turn.start : turn.end], turn.reward) for s in t.sequences for turn in s.turns]
    written = [m for m in t.messages if m["role"] == "assistant"][-len(ends) :]
    return [
        {"text": decode(token_ids), "reward": reward, "calls": len(message.get("tool_calls") or ())}
        for (token_ids, reward), message in zip(ends, written)
    ]


def _digest(question: Question) -> str:
    """Returns a digest of the row, where the prompt is not known before an environment makes it; else ""."""
    if question.token_ids:
        return ""
    return hashlib.blake2b(json.dumps(question.row, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _is_of(group: Group, row: int, question: Question) -> bool:
    """Returns whether a journaled group is of this row of the data."""
    known = list(question.token_ids) or group.prompt_ids
    return (group.row, group.prompt_ids, group.digest) == (row, known, _digest(question))


def require_finite(logps: Iterable[Sequence[float]], to: str, temperature: str) -> None:
    """Checks that a model gave finite log-probabilities.

    Args:
        logps: of each response.
        to: the prompt, for the message.
        temperature: the name of its setting, for the message.

    Raises:
        UserError: its numbers are not finite.
    """
    if not all(math.isfinite(logp) for of_response in logps for logp in of_response):
        raise UserError(
            f"the log-probabilities of a response to {to} are not finite",
            why=f"the model's weights hold numbers that are not finite, or {temperature} is far too small",
            fix="check model.path, or resume from an earlier checkpoint with a lower optim.lr",
        )


@dataclass(slots=True)
class _Scoring:
    """A finished group that is being scored, as far as it has scores."""

    trajectories: list[Trajectory]
    greedy: list[TokenSequence] = field(default_factory=list)  # of the response that is compared with, if it acted
    left_out: list[Trajectory] = field(default_factory=list)  # because one failed
    failed: list[str] = field(default_factory=list)  # why trajectories have no reward to wait for
    scores: list[Score] = field(default_factory=list)
    baseline: Score | None = None
    lacking: int = 0  # submissions without a result

    @property
    def scored(self) -> list[Trajectory]:
        """Those that did not fail before they had a reward."""
        return [t for t in self.trajectories if t.finish_reason != "failed"]

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt that the trajectories begin with."""
        return next((t.sequences[0].prompt_ids for t in (*self.trajectories, *self.left_out) if t.sequences), [])
