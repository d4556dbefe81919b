"""Rewards in this process: for a debugger, and for functions that exist here only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any

from hybridflow.protocols.rewards import Answers, Score
from hybridflow.protocols.waiting import never
from hybridflow.rewards.graders.function import FunctionSpec, check_builtins, load_all


class InProcessGrader:
    """A `protocols.rewards.Grader` that scores in the call of `submit`, without limits.

    Functions that are ``async def`` run in the loop of one further thread, all responses to a prompt at once.

    Args:
        functions: by the names that `submit` is given; functions themselves, or by reference.

    Raises:
        UserError: a function cannot be loaded.
    """

    def __init__(self, functions: Mapping[str, FunctionSpec | Callable[..., Any]]) -> None:
        self._given, self._functions = dict(functions), load_all(functions)
        self.should_return: Callable[[], bool] = never  # `wait` never lasts
        self._done: list[tuple[int, list[Score]]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, key: int, answers: Answers, function: str | None = None) -> None:
        """See `protocols.rewards.Grader.submit`; the function is needed where there are several."""
        assert function is not None or len(self._functions) == 1
        reward = self._functions[next(iter(self._functions)) if function is None else function]
        if reward.is_async:
            work = reward.scores_async(answers)
            scores = asyncio.run_coroutine_threadsafe(work, self._running_loop()).result()
        else:
            scores = reward.scores(answers)
        self._done.append((key, scores))

    def ready(self) -> list[tuple[int, list[Score]]]:
        """See `protocols.rewards.Grader.ready`."""
        done, self._done = self._done, []
        return done

    def wait(self) -> list[tuple[int, list[Score]]]:
        """See `protocols.rewards.Grader.wait`."""
        return self.ready()

    def cancel(self) -> None:
        """See `protocols.rewards.Grader.cancel`."""
        self._done.clear()

    def check(self) -> None:
        """Checks that built-in functions have what they need.

        Raises:
            UserError: one lacks something.
        """
        check_builtins(self._given)

    def close(self) -> None:
        """See `protocols.rewards.Grader.close`."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = self._thread = None

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """Returns one loop for all calls, because what a function keeps (connections) belongs to its loop; a notebook
        runs its own.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="hybridflow-rewards", daemon=True)
            self._thread.start()
        return self._loop
