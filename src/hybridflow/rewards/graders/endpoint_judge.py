"""A model that reads a response and writes a verdict, behind an endpoint.

The default question fences all text of the judged model and of the data with a mark that is a hash of that text: no
text can contain its own hash, so a response cannot close the fence and continue as instructions. A verdict is the
number in the last ``[[...]]`` of the judge's own text; where there is none, or one that may be a quotation of the
response, there is no reward (a failure of the kind "nonsense"), never a silent zero.

A verdict depends only on the seed, the question and the number of the sample: the same response gets the same verdict,
whatever else is judged. Equal responses to a prompt are judged once.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from hybridflow.config.sections.rewards import EndpointJudgeSection, RewardPoolSection
from hybridflow.errors import UserError, nearest
from hybridflow.protocols.rewards import Answers, Score
from hybridflow.protocols.waiting import SECONDS_BETWEEN_LOOKS, never
from hybridflow.rewards.graders.judging import SHOWN, Hearing, Judging, NoVerdict, Verdict, hearing
from hybridflow.rewards.http import CallFailed, LimitedClient


class EndpointJudge:
    """A `protocols.rewards.Grader` whose judge is behind an OpenAI-compatible endpoint.

    Args:
        section: ``reward.judge``.
        pool: ``reward.pool``: limits of time, rate and number of its requests, and how often they are sent again.
        seed: of the run.

    Raises:
        UserError: see `Judging`; the variable with the key is not set; aiohttp is not installed.
    """

    def __init__(self, section: EndpointJudgeSection, pool: RewardPoolSection, *, seed: int) -> None:
        assert section.url is not None
        self.section, self.url = section, section.url.rstrip("/")
        self.judging = Judging(section, seed)
        self.model = section.model
        key = os.environ.get(section.api_key_env)
        if key is None and "api_key_env" in section.model_fields_set:
            raise UserError(
                f"reward.judge.api_key_env is {section.api_key_env}, but there is no such environment variable",
                fix=f"export {section.api_key_env}=..., or leave the key out for an endpoint that needs none",
            )
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = LimitedClient.of(pool)
        self.should_return: Callable[[], bool] = never
        self._open: dict[int, Hearing] = {}
        self._futures: dict[int, list[Future[Any]]] = {}
        self._arrived: queue.SimpleQueue[tuple[int, Hearing, str, int, Future[Any]]] = queue.SimpleQueue()

    def submit(self, key: int, answers: Answers, function: str | None = None) -> None:
        """See `protocols.rewards.Grader.submit`.

        Raises:
            UserError: no model is named, and the endpoint does not say which it has.
        """
        assert key not in self._open, f"key {key} is in use"
        if self.model is None:
            self.model = self._names()[0]
        opened = self._open[key] = hearing(self.judging, answers)
        self._futures[key] = []
        for asked, sample in sorted(opened.missing):
            future = self._ask(asked, sample)
            future.add_done_callback(self._taker(key, opened, asked, sample))
            self._futures[key].append(future)

    def ready(self) -> list[tuple[int, list[Score]]]:
        """See `protocols.rewards.Grader.ready`."""
        while not self._arrived.empty():
            self._take(*self._arrived.get())
        return self._heard()

    def wait(self) -> list[tuple[int, list[Score]]]:
        """See `protocols.rewards.Grader.wait`."""
        done = self.ready()
        while not done and self._open and not self.should_return():
            with suppress(queue.Empty):
                self._take(*self._arrived.get(timeout=SECONDS_BETWEEN_LOOKS))
            done = self.ready()
        return done

    def cancel(self) -> None:
        """See `protocols.rewards.Grader.cancel`."""
        self._open.clear()
        for future in [future for futures in self._futures.values() for future in futures]:
            future.cancel()
        self._futures.clear()

    def check(self) -> None:
        """See `protocols.rewards.Grader.check`: asks which models there are, and for one token.

        Raises:
            UserError: the endpoint does not answer, does not have the model, or does not accept the key.
        """
        names = self._names()
        if self.model is None:
            self.model = names[0]
        elif names and self.model not in names:
            raise UserError(
                f"the judge's endpoint {self.url} has no model {self.model!r}", fix=nearest(self.model, names)
            )
        try:
            _said(self._ask("Say yes.", 0, max_tokens=1).result(), empty=True)
        except (CallFailed, NoVerdict) as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """See `protocols.rewards.Grader.close`."""
        self.cancel()
        self._client.close()

    def _names(self) -> list[str]:
        """Returns the models that the endpoint lists; none if it does not list any, which it must where the
        configuration names no model.
        """
        try:
            listed = self._client.get(f"{self.url}/models", self._headers).result()
        except CallFailed as error:
            if error.status in (404, 405) and self.model is not None:
                return []
            raise self._refused(error) from error
        rows = listed.get("data") if isinstance(listed, Mapping) else None
        names = [str(row["id"]) for row in rows or [] if isinstance(row, Mapping) and "id" in row]
        if not names and self.model is None:
            raise UserError(f"the judge's endpoint {self.url} lists no models", fix="name one: reward.judge.model=...")
        return names

    def _refused(self, error: Exception) -> UserError:
        status = getattr(error, "status", None)
        if status in (401, 403):
            whose = f"the key in {self.section.api_key_env}" if self._headers else "a request without a key"
            return UserError(
                f"the judge's endpoint does not accept {whose}: {error}",
                fix="put its key into the environment variable that reward.judge.api_key_env names",
            )
        fix = "start it, or correct reward.judge.url"
        if status == 404 and not self.url.endswith("/v1"):
            fix = f"the address of most endpoints ends in /v1: reward.judge.url={self.url}/v1"
        elif status is not None:
            fix = "give it what it asks for: reward.judge has the keys model, temperature and max_tokens"
        return UserError(f"the judge cannot be asked: {error}", fix=fix)

    def _ask(self, asked: str, sample: int, max_tokens: int | None = None) -> Future[Any]:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": asked.encode(errors="replace").decode()}],
            "temperature": self.section.temperature,
            "max_tokens": max_tokens or self.section.max_tokens,
            "seed": self.judging.key(asked, sample).bits() % 2**31,
        }
        return self._client.post(f"{self.url}/chat/completions", body, self._headers)

    def _taker(self, key: int, opened: Hearing, asked: str, sample: int) -> Callable[[Future[Any]], None]:
        return lambda future: self._arrived.put((key, opened, asked, sample, future))

    def _take(self, key: int, opened: Hearing, asked: str, sample: int, future: Future[Any]) -> None:
        if self._open.get(key) is not opened:
            return  # it was cancelled
        try:
            opened.tell(asked, sample, _said(future.result()))
        except CallFailed as error:
            opened.tell(asked, sample, NoVerdict(str(error), error.kind))
        except NoVerdict as error:
            opened.tell(asked, sample, error)

    def _heard(self) -> list[tuple[int, list[Score]]]:
        keys = [key for key, opened in self._open.items() if not opened.missing]
        for key in keys:
            del self._futures[key]
        return [(key, self._open.pop(key).scores()) for key in keys]


def _said(answer: Any, *, empty: bool = False) -> Verdict:
    """Returns the text in an endpoint's reply."""
    try:
        choice = answer["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise NoVerdict(f"its endpoint answered without a message: {str(answer)[:SHOWN]!r}") from None
    if not isinstance(text, str) and not (empty and text is None):
        raise NoVerdict(f"its endpoint answered without a text (finish_reason {reason!r})")
    return Verdict(text or "", reason == "length")
