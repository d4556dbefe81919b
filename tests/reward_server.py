"""A real HTTP server in a thread, which counts what arrives and misbehaves when it is told to."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from aiohttp import web


class Server:
    """Answers until it is left.

    Attributes:
        url: of it.
        bodies: JSON that was sent.
        times: when requests arrived, by `time.monotonic`.
        most_at_once: requests that it had at the same time.
        delay: seconds before it answers.
        answers: what it does with the next requests instead: a status, "close" the connection, or a text.
        retry_after: header of these.
        score: what it answers to a POST to /score.
    """

    def __init__(self, score: Callable[[Any], Any] = lambda body: {"scores": [1.0] * len(body["responses"])}) -> None:
        self.bodies: list[Any] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.delay = 0.0
        self.answers: list[Any] = []
        self.retry_after: str | None = None
        self.score = score
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Server:
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> str:
        app = web.Application()
        app.router.add_route("*", "/echo", self._answer)
        app.router.add_post("/score", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        await self._runner.cleanup()
        delayed = asyncio.all_tasks() - {asyncio.current_task()}
        for task in delayed:
            task.cancel()
        await asyncio.gather(*delayed, return_exceptions=True)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.times.append(time.monotonic())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            body = await request.json() if request.can_read_body else None
            self.bodies.append(body)
            if self.delay:
                await asyncio.sleep(self.delay)
            if self.answers:
                return self._misbehave(request, self.answers.pop(0))
            if request.path == "/score":
                return web.json_response(self.score(body))
            return web.json_response({"body": body, "key": request.headers.get("X-Key")})
        finally:
            self.at_once -= 1

    def _misbehave(self, request: web.Request, what: Any) -> web.StreamResponse:
        headers = {} if self.retry_after is None else {"Retry-After": self.retry_after}
        if what == "close":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if isinstance(what, str):
            return web.Response(text=what)
        return web.Response(status=what, text="not now", headers=headers)
