"""The protocol between the owner of a generation engine and what makes trajectories turn by turn.

The owner (`groups/driving.py`) submits requests and hands over results; a maker of trajectories (`Rollouts`) says what
to generate next. Only the owner's thread touches the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Result, Sampling
from hybridflow.protocols.groups import Trajectory


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

    @property
    def written(self) -> Any:
        """The prompt as the row has it."""
        ...


@dataclass(frozen=True, slots=True)
class Start:
    """A trajectory to make.

    Args:
        key: of its noise: seed, stream, draw, sample.
        question: the prompt, or the row that an environment makes one of.
        sampling: how tokens are drawn; `max_tokens` counts what the model samples over the whole trajectory.
        world: the stream of the environment's seed, which depends on the draw beside it.
    """

    key: NoiseKey
    question: Question
    sampling: Sampling
    world: str = "environment"


class Rollouts(Protocol):
    """Makes trajectories."""

    @property
    def order(self) -> Literal["rounds", "free"]:
        """When requests are submitted. "rounds": when the engine is idle and every trajectory asks or has ended, so
        that no bit depends on how long anything took. "free": as they come.
        """
        ...

    def begin(self, start: Start) -> int:
        """Begins a trajectory; returns its number, by which it is known until it has ended."""
        ...

    def asks(self, *, block: bool) -> list[tuple[int, Request]]:
        """Returns the requests that came since, by trajectory, in the order in which these began.

        Args:
            block: wait a moment (`waiting.SECONDS_BETWEEN_LOOKS`) for one, or for the end of a trajectory. With
                "rounds" nothing is returned before each trajectory asks or has ended.
        """
        ...

    def settled(self) -> bool:
        """Returns whether each trajectory asks, waits for the engine, or has ended."""
        ...

    def take(self, number: int, result: Result) -> None:
        """Hands over the result of a trajectory's request."""
        ...

    def ended(self) -> list[tuple[int, Trajectory]]:
        """Returns the trajectories that ended since, without rewards; `failure` says which of them failed."""
        ...

    def on_ready(self, wake: Callable[[], None]) -> None:
        """Takes a function to call, from any thread, when a request or an end is there."""
        ...

    def cancel(self) -> None:
        """Drops all trajectories that have not ended."""
        ...

    def close(self) -> None:
        """Ends its threads and processes."""
        ...
