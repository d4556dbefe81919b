"""Several rewards as one: the parts of a weighted sum, and rows of several data sources.

A part's value is first normalised over the responses to its prompt (``normalize: group``), then clipped, then
multiplied by its weight. Its raw value is a component under the part's name; further numbers that it returns are
components ``part/name``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hybridflow.config.bounds import LARGEST_REWARD
from hybridflow.protocols.rewards import Answers, Failure, Score, total
from hybridflow.protocols.waiting import never, returning_when


class FunctionGrader(Protocol):
    """A `protocols.rewards.Grader` that may hold several functions."""

    should_return: Callable[[], bool]

    def submit(self, key: int, answers: Answers, function: str | None = None) -> None:
        """See `protocols.rewards.Grader.submit`; the function is one of those that it was made with."""
        ...

    def ready(self) -> list[tuple[int, list[Score]]]:
        """See `protocols.rewards.Grader.ready`."""
        ...

    def wait(self) -> list[tuple[int, list[Score]]]:
        """See `protocols.rewards.Grader.wait`."""
        ...

    def cancel(self) -> None:
        """See `protocols.rewards.Grader.cancel`."""
        ...

    def check(self) -> None:
        """See `protocols.rewards.Grader.check`."""
        ...

    def close(self) -> None:
        """See `protocols.rewards.Grader.close`."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a reward.

    Args:
        name: of its component; None for a reward that has this part alone, and passes as it is.
        backend: scores it.
        function: which of the backend's functions.
        weight: its factor in the sum.
        normalize: whether it is normalised over the responses to the prompt.
        clip: least and greatest value, before the weight.
    """

    name: str | None
    backend: FunctionGrader
    function: str | None = None
    weight: float = 1.0
    normalize: bool = False
    clip: tuple[float, float] | None = None


@dataclass(slots=True)
class _Open:
    answers: int
    parts: list[Part]
    scores: dict[int, list[Score]] = field(default_factory=dict)  # by index of the part


class ComposedGrader:
    """Scores the responses to each prompt with the functions that its reward is made of.

    Args:
        route: the parts of a prompt's reward.
        backends: all that the parts may have.
    """

    def __init__(self, route: Callable[[Answers], Sequence[Part]], backends: Sequence[FunctionGrader]) -> None:
        self._route, self._backends = route, list(backends)
        self.should_return: Callable[[], bool] = never
        self._open: dict[int, _Open] = {}
        self._jobs: dict[int, tuple[int, int]] = {}  # what was submitted to a backend: the prompt, and the part
        self._next = 0

    def submit(self, key: int, answers: Answers) -> None:
        """See `protocols.rewards.Grader.submit`."""
        assert key not in self._open, f"key {key} is in use"
        opened = self._open[key] = _Open(len(answers.responses), list(self._route(answers)))
        for i, part in enumerate(opened.parts):
            self._jobs[self._next] = (key, i)
            self._next += 1
            if part.function is None:
                part.backend.submit(self._next - 1, answers)
            else:
                part.backend.submit(self._next - 1, answers, part.function)

    def ready(self) -> list[tuple[int, list[Score]]]:
        """See `protocols.rewards.Grader.ready`."""
        return [done for backend in self._backends for done in self._take(backend.ready())]

    def wait(self) -> list[tuple[int, list[Score]]]:
        """See `protocols.rewards.Grader.wait`."""
        done = self.ready()
        with returning_when(self.should_return, *self._backends):
            while not done and self._open and not self.should_return():
                opened = next(iter(self._open.values()))  # the oldest: wait for its missing scores
                lacking = next(part for i, part in enumerate(opened.parts) if i not in opened.scores)
                done = self._take(lacking.backend.wait()) + self.ready()
        return done

    def cancel(self) -> None:
        """See `protocols.rewards.Grader.cancel`."""
        self._open.clear()
        self._jobs.clear()
        for backend in self._backends:
            backend.cancel()

    def check(self) -> None:
        """See `protocols.rewards.Grader.check`."""
        for backend in self._backends:
            backend.check()

    def close(self) -> None:
        """See `protocols.rewards.Grader.close`."""
        for backend in self._backends:
            backend.close()

    def _take(self, found: Sequence[tuple[int, list[Score]]]) -> list[tuple[int, list[Score]]]:
        done = []
        for job, scores in found:
            key, part = self._jobs.pop(job)
            opened = self._open[key]
            assert len(scores) == opened.answers, f"{len(scores)} scores for {opened.answers} responses"
            opened.scores[part] = scores
            if len(opened.scores) == len(opened.parts):
                del self._open[key]
                done.append((key, combined(opened.parts, [opened.scores[i] for i in range(len(opened.parts))])))
        return done


def combined(parts: Sequence[Part], scores: Sequence[Sequence[Score]]) -> list[Score]:
    """Returns the scores of responses to one prompt, from those of each part (part by part); a failed part fails the
    response.

    A sum beyond the largest reward (`config.bounds.LARGEST_REWARD`) fails it too.
    """
    if len(parts) == 1 and parts[0].name is None:
        return [_bounded(score) for score in scores[0]]
    values = [_values(part, of_part) for part, of_part in zip(parts, scores)]
    return [
        _bounded(_sum(parts, [of_part[i] for of_part in scores], [of_part[i] for of_part in values]))
        for i in range(len(scores[0]))
    ]


def _bounded(score: Score) -> Score:
    numbers = {"is": score.value, "and its steps add up to": total(score)}
    numbers |= {f"has as {name!r}": value for name, value in score.components.items()}
    said = next((f"{verb} {value:g}" for verb, value in numbers.items() if not abs(value) <= LARGEST_REWARD), None)
    if score.failure is not None or said is None:
        return score
    what = f"the reward {said}, not a finite number of at most {LARGEST_REWARD:g}"
    return Score(0.0, failure=Failure("nonsense", what))


def _values(part: Part, scores: Sequence[Score]) -> list[float]:
    """Returns each response's value of a part, without the weight; the value of a failed response means nothing."""
    values = [score.value for score in scores]
    given = [score.value for score in scores if score.failure is None and score.applies]
    if part.normalize and given:
        mean = sum(given) / len(given)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in given) / len(given))
        values = [(value - mean) / (deviation + 1e-6) for value in values]
    if part.clip is not None:
        low, high = part.clip
        values = [min(max(value, low), high) for value in values]
    return values


def _sum(parts: Sequence[Part], scores: Sequence[Score], values: Sequence[float]) -> Score:
    failed = next((score for score in scores if score.failure is not None), None)
    if failed is not None:
        return failed
    components, steps, turns, value_of_all = {}, [], [], 0.0
    for part, score, value in zip(parts, scores, values):
        if not score.applies:
            continue
        components[str(part.name)] = score.value + sum(reward for _, reward in score.turns)
        components |= {f"{part.name}/{name}": value for name, value in score.components.items()}
        steps += [(characters, part.weight * reward) for characters, reward in score.steps]
        turns += [(number, part.weight * reward) for number, reward in score.turns]
        value_of_all += part.weight * value
    return Score(value_of_all, components, tuple(sorted(steps)), tuple(sorted(turns)))
