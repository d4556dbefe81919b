"""HTTP within limits, against a real server that counts what arrives."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing
from typing import Any

import pytest

from hybridflow.rewards.http import CallFailed, LimitedClient, Pace

from at_once import at_once
from reward_server import Server


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def client(**limits: Any) -> LimitedClient:
    return LimitedClient(**{"timeout": 10, "retries": 0, **limits})


def failure(future: Any) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        future.result(30)
    return caught.value


def test_what_is_sent_arrives_and_what_is_answered_comes_back(server: Server) -> None:
    with closing(client()) as http:
        assert http.post(f"{server.url}/echo", {"a": [1, "\u00e9"]}, {"X-Key": "k"}).result(10) == {
            "body": {"a": [1, "\u00e9"]}, "key": "k",
        }  # fmt: skip
        assert http.get(f"{server.url}/echo").result(10) == {"body": None, "key": None}
        with pytest.raises(TypeError):
            http.post(server.url, {"a": object()})
        with pytest.raises(ValueError, match="JSON compliant"):
            http.post(server.url, {"a": float("nan")})


def no_more_at_once_than_allowed() -> None:
    with Server() as server:
        server.delay = 0.05
        with closing(client(concurrency=4)) as http:
            for future in [http.post(f"{server.url}/echo", i) for i in range(24)]:
                future.result(20)
        assert server.most_at_once == 4


def requests_of_a_minute_are_spaced() -> None:
    with Server() as server:
        with closing(client(requests_per_minute=1200)) as http:  # one in 50 ms
            began = time.monotonic()
            for future in [http.post(f"{server.url}/echo", i) for i in range(11)]:
                future.result(20)
        for i, arrived in enumerate(server.times):  # late is no fault; a tenth of a second may be caught up with
            assert arrived - began >= i * 0.05 - 0.1


def tokens_of_a_minute_are_spaced() -> None:
    with Server() as server, closing(client(tokens_per_minute=60_000)) as http:  # a thousand a second
        began = time.monotonic()
        for future in [http.post(f"{server.url}/echo", i, tokens=100) for i in range(6)]:
            future.result(20)
        assert server.times[-1] - began >= 0.5 - 0.1
        began = time.monotonic()
        for future in [http.post(f"{server.url}/echo", 2000 * "x") for _ in range(2)]:  # 500 each, by their length
            future.result(20)
        assert server.times[-1] - began >= 0.5 - 0.1


def test_a_pace_keeps_its_rate_over_any_time() -> None:
    pace, now, begun = Pace(60), 1000.0, []
    for i in range(200):
        now = max(now, pace.free) + (0.03 if i % 3 else 0.0)  # timers are late
        pace.take(now, 1.0)
        begun.append(now)
    assert 199 - 0.1 <= begun[-1] - begun[0] < 199 + 10
    pace.take(5000.0, 1.0)  # idle for long: nothing was saved up
    assert pace.free == 5000.0 - 0.1 + 1.0


def what_may_pass_is_tried_again_after_waits_that_double() -> None:
    with ExitStack() as stack, closing(client(retries=2)) as http:
        servers = {how: stack.enter_context(Server()) for how in (500, 503, 429, 408, "close")}
        for how, server in servers.items():
            server.answers = [how, how]
        futures = [http.post(f"{server.url}/echo", 1) for server in servers.values()]
        assert [future.result(20)["body"] for future in futures] == [1] * 5
        times = {how: server.times for how, server in servers.items()}
    assert {how: t for how, t in times.items() if len(t) != 3 or t[1] - t[0] < 0.5 or t[2] - t[1] < 1.0} == {}


def after_all_attempts_it_says_what_the_last_one_was() -> None:
    with Server() as server:
        server.answers = [503] * 9
        with closing(client(retries=1)) as http:
            error = failure(http.post(f"{server.url}/echo", 1))
            assert (error.kind, error.status, error.unreachable) == ("refused", 503, False)
            assert str(error) == f"{server.url}/echo answers 503: not now (2 attempts)" and len(server.times) == 2


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_tried_again(server: Server, status: int) -> None:
    server.answers = [status]
    with closing(client(retries=3)) as http:
        error = failure(http.post(f"{server.url}/echo", 1))
        assert (error.kind, error.status) == ("refused", status) and len(server.times) == 1


def test_what_is_no_json_is_nonsense(server: Server) -> None:
    server.answers = ["<html>"]
    with closing(client()) as http:
        error = failure(http.post(f"{server.url}/echo", 1))
        assert error.kind == "nonsense" and "not JSON: '<html>'" in str(error)


def retry_after_is_waited_for_by_all() -> None:
    with Server() as server:
        server.answers, server.retry_after = [429], "1"
        with closing(client(retries=1, concurrency=1)) as http:
            futures = [http.post(f"{server.url}/echo", i) for i in range(4)]
            assert [f.result(20)["body"] for f in futures] == [0, 1, 2, 3]
        assert len(server.times) == 5 and server.times[1] - server.times[0] >= 1.0


def test_a_server_that_wants_a_long_wait_is_given_up(server: Server) -> None:
    server.answers, server.retry_after = [429], "3600"
    with closing(client(retries=3)) as http:
        error = failure(http.post(f"{server.url}/echo", 1))
        assert error.status == 429 and "to be asked again in 3600 s" in str(error)


def time_is_limited_for_each_attempt() -> None:
    with Server() as server:
        server.delay = 30
        with closing(client(timeout=0.1, retries=1)) as http:
            began = time.monotonic()
            error = failure(http.post(f"{server.url}/echo", 1))
            assert error.kind == "timeout" and "did not answer within 0.1 s (2 attempts)" in str(error)
            assert 0.7 <= time.monotonic() - began < 10 and len(server.times) == 2
            assert failure(http.post(f"{server.url}/echo", 1, timeout=0.1, retries=0)).kind == "timeout"


def test_nobody_there_is_said_so() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # taken, and not listening
        with closing(client()) as http:
            error = failure(http.post(f"http://127.0.0.1:{held.getsockname()[1]}/", 1))
            assert error.unreachable and error.status is None and "cannot be reached" in str(error)
            assert failure(http.get("http://nowhere.invalid/")).unreachable
            assert failure(http.get("host/without/scheme")).unreachable


def test_what_is_cancelled_ends_and_gives_its_place_free(server: Server) -> None:
    server.delay = 30
    with closing(client(concurrency=1, timeout=60)) as http:
        stuck, waiting = (http.post(f"{server.url}/echo", i) for i in range(2))
        while not server.times:
            time.sleep(0.01)
        server.delay = 0
        stuck.cancel()
        assert waiting.result(10)["body"] == 1


def test_closing_cancels_all_and_leaves_no_thread(server: Server) -> None:
    server.delay = 30
    before = threading.active_count()
    http = client(concurrency=1)
    futures = [http.post(f"{server.url}/echo", i) for i in range(3)]
    while not server.times:
        time.sleep(0.01)
    http.close()
    http.close()
    for future in futures:
        with pytest.raises((CancelledError, asyncio.CancelledError)):
            future.result(5)
    assert threading.active_count() == before


def test_what_waits_waits_as_long_as_it_says() -> None:
    at_once(
        no_more_at_once_than_allowed,
        requests_of_a_minute_are_spaced,
        tokens_of_a_minute_are_spaced,
        after_all_attempts_it_says_what_the_last_one_was,
        retry_after_is_waited_for_by_all,
        time_is_limited_for_each_attempt,
        what_may_pass_is_tried_again_after_waits_that_double,
    )
