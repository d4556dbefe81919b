"""HTTP calls within limits of calls in flight and calls per minute, with further attempts where these may help.

Every reward behind HTTP uses `LimitedClient`: the user's own server (`remote`), a judge's endpoint, a sandbox server.
It needs aiohttp (``hybridflow[server]``), and no event loop of its caller.

    client = LimitedClient(concurrency=64, timeout=60, retries=3, requests_per_minute=600)
    future = client.post("http://host/score", {"responses": ["4"]}, tokens=10)  # returns at once
    future.add_done_callback(...)                                               # in the client's thread
    future.result()                                                             # the JSON of the answer, or CallFailed
    client.close()
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hybridflow.errors import UserError

if TYPE_CHECKING:
    from hybridflow.config.sections.rewards import RewardPoolSection

BACK_OFF = 0.5  # seconds before the second attempt; doubled before each further one
LONGEST_WAIT = 120.0  # seconds that a server may ask us to wait, and the longest wait between attempts
KEEP_ALIVE = 2.0  # seconds for which an idle connection is reused: fewer than any server keeps it
SLACK = 0.1  # seconds by which a pace may catch up
SAID = 300  # characters of a server's reply in our messages
RETRIED = (408, 429)  # statuses below 500 that another attempt may change


class CallFailed(Exception):
    """A call that has no reply after all attempts; its text is one sentence that begins with the address.

    Attributes:
        kind: "timeout", "refused" (4xx, 5xx, no connection) or "nonsense" (an answer that is not JSON): see
            `protocols.rewards.Failure.kind`.
        status: of the last reply; None where there was none.
        unreachable: whether nothing listens at the address.
    """

    def __init__(self, said: str, *, kind: str, status: int | None = None, unreachable: bool = False) -> None:
        super().__init__(said)
        self.kind, self.status, self.unreachable = kind, status, unreachable


class Pace:
    """Decides when the next piece of work may begin, at a fixed rate; evenly spaced, without bursts.

    Work of cost c delays the work after it by c / rate minutes. So the work of any window of t minutes costs at most
    rate x t, plus the piece that began last in it (and a tenth of a second's, to make up for late timers).

    Args:
        per_minute: how much.
    """

    def __init__(self, per_minute: float) -> None:
        self.seconds_each = 60 / per_minute
        self.free = 0.0

    def take(self, now: float, cost: float) -> None:
        """Begins work of this cost; `free` is when the next may begin, in seconds of the same clock as `now`."""
        # A timer that fires a little late must not lower the rate: up to a tenth of a second is made up for.
        self.free = max(self.free, now - SLACK) + cost * self.seconds_each


@dataclass(frozen=True, slots=True)
class _Call:
    method: str
    url: str
    data: bytes | None
    headers: Mapping[str, str]
    tokens: float
    timeout: float
    retries: int


class LimitedClient:
    """Sends requests from a thread of its own. Its methods may be called from any thread.

    An attempt that finds no connection, is closed, takes longer than `timeout`, or is answered 408, 429 or 5xx is
    followed by another, after 0.5, 1, 2, ... seconds, or after what the server asks for in ``Retry-After`` where that
    is longer; other requests then wait too. Every attempt counts against the limits. Waits have no random part.

    Args:
        concurrency: most requests in flight at once.
        timeout: seconds for one attempt, once it may begin.
        retries: attempts after the first.
        requests_per_minute: most attempts that begin in a minute, evenly spaced; None: any number.
        tokens_per_minute: the same for the `tokens` of `post`.

    Raises:
        UserError: aiohttp is not installed.
    """

    def __init__(
        self,
        *,
        concurrency: int = 64,
        timeout: float = 60,
        retries: int = 3,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ) -> None:
        self.timeout, self.retries = timeout, retries
        self._http = _aiohttp()
        self._requests = Pace(requests_per_minute) if requests_per_minute else None
        self._tokens = Pace(tokens_per_minute) if tokens_per_minute else None
        self._quiet_until = 0.0  # a server asked for this delay
        self._session: Any = None
        self._loop = asyncio.new_event_loop()
        self._slots, self._gate = asyncio.Semaphore(concurrency), asyncio.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hybridflow-http", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, pool: RewardPoolSection) -> LimitedClient:
        """Makes a client with the limits of ``reward.pool``."""
        return cls(
            concurrency=pool.concurrency,
            timeout=pool.timeout,
            retries=pool.retries,
            requests_per_minute=pool.requests_per_minute,
            tokens_per_minute=pool.tokens_per_minute,
        )

    def post(
        self,
        url: str,
        body: Any,
        headers: Mapping[str, str] | None = None,
        tokens: float | None = None,
        *,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Future[Any]:
        """Sends JSON; returns at once.

        Args:
            url: where to.
            body: is sent as JSON; it must be serialisable (`TypeError` and `ValueError` come from here, not later).
            headers: further ones.
            tokens: its share of `tokens_per_minute`; None: a quarter of the characters that are sent.
            timeout: seconds for each attempt instead of the client's.
            retries: instead of the client's.

        Returns:
            A future of the JSON that the server answers. It raises `CallFailed` where it does not. Cancelling it ends
            the request.
        """
        data = json.dumps(body, allow_nan=False).encode()
        sent = {"Content-Type": "application/json", **(headers or {})}
        return self._begin("POST", url, data, sent, len(data) / 4 if tokens is None else tokens, timeout, retries)

    def get(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Future[Any]:
        """Sends a GET without a body, with the same limits."""
        return self._begin("GET", url, None, headers or {}, 0, timeout, retries)

    def close(self) -> None:
        """Ends all requests (their futures are cancelled), connections and the thread. May be called again."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _begin(
        self,
        method: str,
        url: str,
        data: bytes | None,
        headers: Mapping[str, str],
        tokens: float,
        timeout: float | None,
        retries: int | None,
    ) -> Future[Any]:
        timeout = self.timeout if timeout is None else timeout
        retries = self.retries if retries is None else retries
        call = _Call(method, url, data, headers, tokens, timeout, retries)
        return asyncio.run_coroutine_threadsafe(self._call(call), self._loop)

    # --- in the loop's thread ---

    async def _call(self, call: _Call) -> Any:
        for number in range(call.retries + 1):
            try:
                async with self._slots:
                    await self._turn(call.tokens)
                    return await self._attempt(call)
            except _MayPass as failed:
                if failed.wait > LONGEST_WAIT:
                    raise CallFailed(
                        f"{failed.said}, and to be asked again in {failed.wait:.0f} s", kind=failed.kind,
                        status=failed.status,
                    ) from failed  # fmt: skip
                if number == call.retries:
                    tries = f" ({number + 1} attempts)" if number else ""
                    raise CallFailed(
                        failed.said + tries, kind=failed.kind, status=failed.status, unreachable=failed.unreachable
                    ) from failed
                if failed.wait:
                    self._quiet_until = max(self._quiet_until, time.monotonic() + failed.wait)
                await asyncio.sleep(max(failed.wait, min(BACK_OFF * 2**number, LONGEST_WAIT)))
        raise AssertionError("the last attempt returns or raises")

    async def _turn(self, tokens: float) -> None:
        """Returns when the limits let a request begin; one after the other, in order of arrival."""
        async with self._gate:
            paces = [(p, cost) for p, cost in ((self._requests, 1.0), (self._tokens, tokens)) if p is not None]
            begin = max((p.free for p, _ in paces), default=0.0)
            while (wait := max(begin, self._quiet_until) - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            for pace, cost in paces:
                pace.take(time.monotonic(), cost)

    async def _attempt(self, call: _Call) -> Any:
        client = self._http
        if self._session is None:
            connector = client.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
            self._session = client.ClientSession(connector=connector)
        limit = client.ClientTimeout(total=call.timeout)
        try:
            async with self._session.request(
                call.method, call.url, data=call.data, headers=call.headers, timeout=limit
            ) as response:
                text = (await response.read()).decode(errors="replace")
        except TimeoutError as error:
            raise _MayPass(f"{call.url} did not answer within {call.timeout:g} s", kind="timeout") from error
        except client.InvalidURL as error:
            raise CallFailed(f"{call.url} is no address", kind="refused", unreachable=True) from error
        except client.ClientConnectorError as error:
            said = f"{call.url} cannot be reached ({error})"
            raise _MayPass(said, kind="refused", unreachable=True) from error
        except (client.ClientError, OSError) as error:
            said = f"{call.url} closed the connection ({type(error).__name__}: {error})"
            raise _MayPass(said, kind="refused") from error
        return _read(call.url, response.status, text, response.headers.get("Retry-After"))

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()


class _MayPass(Exception):
    """An attempt that failed where another may succeed, after `wait` seconds, if the server says how long."""

    def __init__(
        self, said: str, *, kind: str, status: int | None = None, wait: float = 0.0, unreachable: bool = False
    ) -> None:
        super().__init__(said)
        self.said, self.kind, self.status, self.wait, self.unreachable = said, kind, status, wait, unreachable


def _read(url: str, status: int, text: str, retry_after: str | None) -> Any:
    if status in RETRIED or status >= 500:
        raise _MayPass(
            f"{url} answers {status}: {text[:SAID]}", kind="refused", status=status, wait=seconds_asked(retry_after)
        )
    if not 200 <= status < 300:
        raise CallFailed(f"{url} answers {status}: {text[:SAID]}", kind="refused", status=status)
    try:
        return json.loads(text)
    except ValueError as error:
        said = f"{url} answers something that is not JSON: {text[:SAID]!r}"
        raise CallFailed(said, kind="nonsense", status=status) from error


def seconds_asked(retry_after: str | None, now: Callable[[], float] = time.time) -> float:
    """Returns the seconds that a header ``Retry-After`` means (RFC 9110, 10.2.3); 0 without one, or with one that is
    malformed.

    >>> seconds_asked("2"), seconds_asked(None), seconds_asked("soon")
    (2.0, 0.0, 0.0)
    >>> seconds_asked("Wed, 21 Oct 2015 07:28:00 GMT", now=lambda: 1445412470.0)
    10.0
    """
    if retry_after is None:
        return 0.0
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - now())
    except (ValueError, TypeError):
        return 0.0


def _aiohttp() -> ModuleType:
    try:
        import aiohttp
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise UserError(
            "aiohttp is not installed in this environment",
            why="a reward, judge or sandbox behind HTTP is asked through it",
            fix="pip install 'hybridflow[server]'",
        ) from error
    return aiohttp
