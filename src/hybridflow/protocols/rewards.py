"""The protocol of graders, which score responses, and its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hybridflow.protocols.waiting import Stopped, never


@dataclass(frozen=True, slots=True)
class Answers:
    """Responses to one prompt, to be scored.

    Args:
        responses: their texts.
        ground_truth: what they are compared with.
        prompt: the chat messages that they respond to.
        row: the whole row of the data.
        written: the prompt as the row has it, a string or messages; None: `prompt`.
        token_ids: of each response; None where there are texts alone.
        finals: the text of the last turn of each, where the model acted; None: responses are single turns.
        conversations: the messages of each, with results of tools; None likewise.
        turns: the turns of each, as ``{"text": ..., "reward": the environment's, "calls": number}``; None likewise.
    """

    responses: list[str]
    ground_truth: Any
    prompt: list[dict[str, Any]]
    row: dict[str, Any]
    written: Any = None
    token_ids: Sequence[Sequence[int]] | None = None
    finals: list[str] | None = None
    conversations: list[list[dict[str, Any]]] | None = None
    turns: list[list[dict[str, Any]]] | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a response has no reward.

    Args:
        kind: "raised", "timeout", "died" (its process), "nonsense" (what it returned), "refused" (a server), "columns"
            (it wants one that the row lacks).
        what: what went wrong, in words.
        scoring: the response and what it was compared with, in words; "" where `what` names them.
    """

    kind: str
    what: str
    scoring: str = ""

    def __str__(self) -> str:
        return f"{self.what} (it was scoring {self.scoring})" if self.scoring else self.what


@dataclass(frozen=True, slots=True)
class Score:
    """The score of a response.

    Args:
        value: the reward of the whole response. Where it failed it is 0 and means nothing.
        components: further numbers, by name.
        steps: rewards of parts of the response: (how many characters of it the part ends after, reward).
        turns: rewards of turns: (number of the turn, reward).
        failure: why there is no reward; None where there is one.
        applies: False where the reward does not judge this response (it returned None): the value is then 0, and in a
            sum of several rewards this one is left out.
    """

    value: float
    components: dict[str, float] = field(default_factory=dict)
    steps: tuple[tuple[int, float], ...] = ()
    turns: tuple[tuple[int, float], ...] = ()
    failure: Failure | None = None
    applies: bool = True

    @property
    def kind(self) -> str:
        """The kind of the failure; "" where there is none."""
        return "" if self.failure is None else self.failure.kind


class Grader(Protocol):
    """Scores responses while others are generated. Not thread-safe; one owner.

    Attributes:
        should_return: called now and then by a `wait` that lasts; when it returns True, `wait` returns what is ready.
    """

    should_return: Callable[[], bool]

    def submit(self, key: int, answers: Answers) -> None:
        """Begins to score. The key comes back with the scores; it must not be in use."""
        ...

    def ready(self) -> list[tuple[int, list[Score]]]:
        """Returns what has been scored since, without waiting: for each key, a score for every response."""
        ...

    def wait(self) -> list[tuple[int, list[Score]]]:
        """Waits for the scores of at least one key and returns what is ready. Returns at once if nothing is
        submitted.
        """
        ...

    def cancel(self) -> None:
        """Drops everything that has been submitted."""
        ...

    def check(self) -> None:
        """Checks that it can work, without scoring anything: servers respond, models and tools are there.

        Raises:
            UserError: it cannot.
        """
        ...

    def close(self) -> None:
        """Ends its processes and connections."""
        ...


def total(score: Score) -> float:
    """Returns the reward of a response, with its parts."""
    return score.value + sum(reward for _, reward in (*score.steps, *score.turns))


def score_all(grader: Grader, asked: Iterable[Answers], should_stop: Callable[[], bool] = never) -> list[list[Score]]:
    """Returns the scores of all these responses, in their order; nothing else may be in flight in the grader.

    Raises:
        Stopped: `should_stop` returned True.
    """
    count = 0
    found: dict[int, list[Score]] = {}
    for count, answers in enumerate(asked, start=1):
        grader.submit(count - 1, answers)
        found.update(grader.ready())
        if should_stop():
            break
    while len(found) < count and not should_stop():
        found.update(grader.wait())
    if should_stop():
        grader.cancel()
        raise Stopped
    return [found[i] for i in range(count)]
