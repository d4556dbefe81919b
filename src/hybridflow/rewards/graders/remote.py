"""Rewards from the user's own server: ``reward.function=http://host:port/path``.

One request for all responses to a prompt, with `reward.kwargs` beside them:

    POST {"responses": ["...", ...], "ground_truth": ..., "prompt": [{"role": ..., "content": ...}], "row": {...}}
    200  {"scores": [1.0, {"score": 0.5, "format": 1.0}, ...]}

Where the model acted, the request also has "finals", "messages" and "turns", one of each response, as a function gets
them (`function`). A score is a number, or an object as a function would return it (`function.read_score`). After a
status 4xx the request is not sent again; after 429 and 5xx it is (`limits`).
"""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hybridflow.errors import UserError
from hybridflow.protocols.rewards import Answers, Score
from hybridflow.protocols.waiting import SECONDS_BETWEEN_LOOKS, never
from hybridflow.rewards.graders.function import CUT, failures, read_scores
from hybridflow.rewards.http import CallFailed, LimitedClient

if TYPE_CHECKING:
    from hybridflow.config.sections.rewards import RewardPoolSection

REACHABLE = 10.0  # seconds that a server may take to answer anything, before a run
OURS = ("responses", "ground_truth", "prompt", "row", "finals", "messages", "turns")


class RemoteGrader:
    """A `protocols.rewards.Grader` that sends responses to a server.

    Args:
        url: of the server.
        pool: ``reward.pool``.
        kwargs: part of every request.

    Raises:
        UserError: aiohttp is not installed, or an argument has the name of a field of the request.
    """

    def __init__(self, url: str, pool: RewardPoolSection, kwargs: Mapping[str, Any] | None = None) -> None:
        self.url, self._kwargs = url, dict(kwargs or {})
        self.should_return: Callable[[], bool] = never
        taken = [name for name in OURS if name in self._kwargs]
        if taken:
            raise UserError(
                f"reward.kwargs has {taken[0]!r}, which every request to {url} holds anyway", fix="give it another name"
            )
        self._client = LimitedClient.of(pool)
        self._open: dict[int, tuple[Answers, Future[Any]]] = {}
        self._ended: queue.SimpleQueue[tuple[int, Future[Any]]] = queue.SimpleQueue()

    def submit(self, key: int, answers: Answers, function: str | None = None) -> None:
        """See `protocols.rewards.Grader.submit`; a server is one function.

        Raises:
            UserError: the row holds what JSON has no form for.
        """
        body = {
            "responses": answers.responses, "ground_truth": answers.ground_truth,
            "prompt": answers.prompt, "row": answers.row, **self._kwargs,
        }  # fmt: skip
        if answers.turns is not None:
            body |= {"finals": answers.finals, "messages": answers.conversations, "turns": answers.turns}
        try:
            future = self._client.post(self.url, body)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{_unserialisable(body)} cannot be sent to the reward server {self.url} as JSON: {error}",
                why="every request holds the whole row, its prompt and its ground truth",
                fix="leave columns that the reward does not need out of the data, or use a function in a file",
            ) from error
        self._open[key] = answers, future
        future.add_done_callback(lambda done: self._ended.put((key, done)))

    def ready(self) -> list[tuple[int, list[Score]]]:
        """See `protocols.rewards.Grader.ready`."""
        found = []
        while True:
            try:
                found += self._scores(*self._ended.get_nowait())
            except queue.Empty:
                return found

    def wait(self) -> list[tuple[int, list[Score]]]:
        """See `protocols.rewards.Grader.wait`."""
        found: list[tuple[int, list[Score]]] = []
        while self._open and not found and not self.should_return():
            with suppress(queue.Empty):
                found = [*self._scores(*self._ended.get(timeout=SECONDS_BETWEEN_LOOKS)), *self.ready()]
        return found

    def cancel(self) -> None:
        """See `protocols.rewards.Grader.cancel`."""
        given_up, self._open = self._open, {}
        for _, future in given_up.values():
            future.cancel()

    def check(self) -> None:
        """Checks that a server listens at the address; any reply to a GET passes.

        Raises:
            UserError: none does.
        """
        try:
            self._client.get(self.url, timeout=REACHABLE, retries=0).result()
        except CallFailed as error:
            if error.status is None:
                raise UserError(
                    f"the reward server cannot be used: {error}",
                    why=f"reward.function is {self.url}",
                    fix=f"start the server before the run, and look at its address from this host: curl -i {self.url}",
                ) from error

    def close(self) -> None:
        """See `protocols.rewards.Grader.close`."""
        self._client.close()

    def _scores(self, key: int, future: Future[Any]) -> list[tuple[int, list[Score]]]:
        if key not in self._open or self._open[key][1] is not future:  # cancelled
            return []
        answers, _ = self._open.pop(key)
        return [(key, self._read(future, answers))]

    def _read(self, future: Future[Any], answers: Answers) -> list[Score]:
        try:
            said = future.result()
        except CallFailed as error:
            return failures(self.url, error.kind, f"failed: {error}", answers, None)
        except CancelledError:
            return failures(self.url, "refused", "was given up", answers, None)
        if not isinstance(said, Mapping) or "scores" not in said:
            found = json.dumps(said)[:CUT]
            return failures(self.url, "nonsense", f"answers without 'scores': {found}", answers, None)
        return read_scores(self.url, said["scores"], answers)


def _unserialisable(body: Mapping[str, Any]) -> str:
    """Names the part of a request that JSON has no form for."""
    for name, value in body.items():
        for place, part in value.items() if name == "row" else [("", value)]:
            try:
                json.dumps(part, allow_nan=False)
            except (TypeError, ValueError):
                return f"row[{place!r}]" if name == "row" else name
    return "the row"
