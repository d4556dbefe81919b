"""Loops of an episode: the built-in one, and those of users."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

from hybridflow.agents.episode import Episode
from hybridflow.agents.threads import in_thread, waited
from hybridflow.errors import UserError
from hybridflow.protocols.environments import Action, Messages, Observation

Play: TypeAlias = Callable[[Episode, dict[str, Any]], Awaitable[None]]


async def play(episode: Episode, row: dict[str, Any]) -> None:
    """Plays an episode: observe, sample, step, until the environment is done."""
    observation = await episode.reset(row)
    while not observation.done:
        observation = await episode.step(await episode.sample())


def loop_of(function: Callable[..., Any], name: str) -> Play:
    """Makes a loop of a user's ``play(episode, row)``; a plain function runs in a thread, on a `PlainEpisode`.

    Raises:
        UserError: it does not take these two arguments.
    """
    try:
        inspect.signature(function).bind(None, {})
    except TypeError as error:
        raise UserError(
            f"the loop {name} cannot be called: {error}",
            why="it is called as play(episode, row)",
            fix="define it as `async def play(episode, row)` or `def play(episode, row)`",
        ) from None
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return function

    async def in_a_thread(episode: Episode, row: dict[str, Any]) -> None:
        returned = await in_thread(function, PlainEpisode(episode), row)
        if inspect.iscoroutine(returned):
            returned.close()
            raise UserError(
                f"the loop {name} returned a coroutine, which nothing has run",
                why="a plain function is run in a thread; one defined with `async def` is awaited",
                fix="define it with `async def`, and await what it returns now",
            )

    return in_a_thread


class PlainEpisode:
    """An `Episode` for loops that are plain functions: its methods return when they are done.

    Args:
        episode: the episode.
    """

    def __init__(self, episode: Episode) -> None:
        self._episode, self._wait = episode, waited()

    @property
    def messages(self) -> Messages:
        """The conversation so far."""
        return self._episode.messages

    @property
    def turns(self) -> int:
        """The number of turns that were sampled."""
        return self._episode.turns

    def reset(self, row: dict[str, Any]) -> Observation:
        """Begins the episode, as `Episode.reset` does."""
        return self._wait(self._episode.reset(row))

    def sample(self, messages: Messages = (), *, max_tokens: int | None = None) -> Action:  # type: ignore[assignment]
        """Samples a turn, as `Episode.sample` does."""
        return self._wait(self._episode.sample(messages, max_tokens=max_tokens))

    def step(self, action: Action) -> Observation:
        """Has the environment take a turn, as `Episode.step` does."""
        return self._wait(self._episode.step(action))

    def reward(self, value: float) -> None:
        """Adds a reward to the last turn."""
        self._episode.reward(value)

    def end(self, reason: str = "done") -> NoReturn:
        """Ends the episode."""
        self._episode.end(reason)
