"""Servers that fail, hang, close and die: what was asked is answered once, and as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hybridflow.errors import UserError
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Result, Sampling, Span, generate
from hybridflow.rollout.served.process import free_port
from hybridflow.rollout.startup import EngineModel, Launch, Supervision
from hybridflow.rollout.vllm.server import VllmServerEngine
from hybridflow.weights.stream import WeightSyncError

from server_peer import ask, interpreter, start_peer, token_of

Engines = Callable[..., VllmServerEngine]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    return tmp_path


@pytest.fixture
def ours(model: Path) -> Iterator[Engines]:
    """Makes engines that start their servers themselves."""
    made: list[VllmServerEngine] = []

    def make(replicas: int = 1, *, restarts: int = 3, answer_timeout: float = 60, **behaviour: Any) -> VllmServerEngine:
        python = interpreter(model, **behaviour)
        engine = VllmServerEngine(
            EngineModel(model, 64), replicas=replicas, launch=Launch(python, model),
            supervision=Supervision(60, answer_timeout, restarts),
        )  # fmt: skip
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def theirs() -> Iterator[Engines]:
    """Makes engines on servers that somebody else has started."""
    made: list[Any] = []

    def make(*behaviours: dict[str, Any], answer_timeout: float = 60) -> VllmServerEngine:
        ports = [free_port() for _ in behaviours]
        made.extend(start_peer(port, **behaviour) for port, behaviour in zip(ports, behaviours))
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        engine = VllmServerEngine(
            EngineModel(None, 64), servers=urls, supervision=Supervision(answer_timeout=answer_timeout)
        )
        made.append(engine)
        return engine

    yield make
    for one in reversed(made):
        one.close() if isinstance(one, VllmServerEngine) else one.kill()


def requests(count: int, max_tokens: int = 8) -> list[Request]:
    return [Request((i + 1, i + 2, 5), Sampling(max_tokens), NoiseKey(0, "train", i)) for i in range(count)]


def wanted(request: Request, version: int = 0) -> list[int]:
    seed, prompt = request.noise.bits() & (2**63 - 1), list(request.prompt_ids)
    return [token_of(prompt, seed, place, str(version)) for place in range(request.sampling.max_tokens)]


def as_undisturbed(asked: list[Request], results: list[Result], version: int = 0) -> None:
    for request, result in zip(asked, results, strict=True):
        assert result.token_ids == wanted(request, version)
        assert result.logps == [-token / 100 for token in result.token_ids]
        assert (result.finish_reason, result.spans) == ("length", [Span(version, 0, len(result.token_ids))])


def urls(engine: VllmServerEngine) -> list[str]:
    return [replica.state.url for replica in engine._live]


def pids(engine: VllmServerEngine) -> list[int]:
    """Of the servers themselves, not of their guardians."""
    found = []
    for replica in engine._live:
        guardian = replica.state.process._process.pid
        found.append(int(Path(f"/proc/{guardian}/task/{guardian}/children").read_text().split()[0]))
    return found


def told(engine: VllmServerEngine) -> list[str]:
    said: list[str] = []
    engine.note = lambda kind, text: said.append(text)
    return said


def test_answers_come_in_order_of_completion(ours: Engines) -> None:
    engine = ours(delay=0.02)
    slow, quick = requests(2)
    handles = [engine.submit(Request(slow.prompt_ids, Sampling(30), slow.noise)), engine.submit(quick)]
    assert [r.handle for r in engine.wait()] == handles[1:]
    assert [r.handle for r in engine.wait()] == handles[:1]
    assert engine.wait() == []


def test_requests_of_one_prompt_stay_together_and_replicas_get_equal_work(theirs: Engines) -> None:
    engine = theirs({}, {})
    asked = [r for i in range(6) for r in [requests(6)[i]] * 4]
    as_undisturbed(asked, generate(engine, asked))
    first, second = (ask(url, "/served")[1:] for url in urls(engine))  # the first request of all is the engine's own
    assert len(first) == len(second) == 12
    assert not {tuple(p) for p in first} & {tuple(p) for p in second}
    picked = Request(asked[0].prompt_ids, Sampling(4), asked[0].noise, replica=1)
    generate(engine, [picked] * 3)
    assert len(ask(urls(engine)[1], "/served")) == 1 + 12 + 3
    with pytest.raises(UserError, match="replica 2, counted from 0, of 2"):
        engine.submit(Request((1,), Sampling(4), NoiseKey(0, "x"), replica=2))


def test_a_trajectory_stays_on_its_replica_and_outlives_it(theirs: Engines) -> None:
    """Results name the replica that has their beginning in its cache; turns that name it are generated there."""
    engine = theirs({}, {})
    asked = [r for r in requests(6) for _ in range(2)]
    first = generate(engine, asked)
    served = {url: ask(url, "/served")[1:] for url in urls(engine)}
    for request, result in zip(asked, first, strict=True):
        assert list(request.prompt_ids) in served[urls(engine)[result.replica]]
    assert {r.replica for r in first} == {0, 1}
    turns = [
        Request((*q.prompt_ids, *r.token_ids, i), Sampling(4), q.noise, replica=r.replica, position=len(r.token_ids))
        for i, (q, r) in enumerate(zip(asked, first))
    ]
    second = generate(engine, turns)
    assert [r.replica for r in second] == [r.replica for r in first]
    for place, url in enumerate(urls(engine)):
        mine = [list(q.prompt_ids) for q, r in zip(turns, first) if r.replica == place]
        assert sorted(ask(url, "/served")[1 + len(served[url]) :]) == sorted(mine)
    seeds = [NoiseKey(q.noise.bits(), "continued", 8).bits() & (2**63 - 1) for q in turns]
    assert [r.token_ids for r in second] == [
        [token_of(list(q.prompt_ids), seed, place, "0") for place in range(4)] for q, seed in zip(turns, seeds)
    ]
    ask(urls(engine)[1], "/behave", {"close": 10**6})
    assert [r.token_ids for r in generate(engine, turns)] == [r.token_ids for r in second]
    assert engine.replicas == 1
    assert {r.replica for r in generate(engine, turns)} == {0}, "a turn that names an evicted replica goes to another"


@pytest.mark.parametrize("fault", [{"fail": 3}, {"close": 3}])
def test_a_failure_that_passes_costs_nothing_but_time(theirs: Engines, fault: dict[str, int]) -> None:
    engine, asked = theirs({}), requests(6)
    said = told(engine)
    ask(urls(engine)[0], "/behave", fault)
    as_undisturbed(asked, generate(engine, asked))
    assert engine.wait() == []
    assert len(said) == 1 and ("out of memory" if "fail" in fault else "closed the connection") in said[0]


@pytest.mark.parametrize("fault", [{"fail": 10**6}, {"close": 10**6}, {"delay": 3600, "deaf": True}])
def test_a_server_that_stays_broken_is_left_out_and_the_others_take_over(
    theirs: Engines, fault: dict[str, Any]
) -> None:
    engine, asked = theirs({}, {"delay": 0.01}, answer_timeout=3.0), requests(8)
    said = told(engine)
    ask(urls(engine)[0], "/behave", fault)
    began = time.monotonic()
    as_undisturbed(asked, generate(engine, asked))
    assert time.monotonic() - began < 20
    assert engine.wait() == [] and engine.replicas == 1 and engine.receivers() == ["this-host"]
    assert any("the run continues without the server http://127.0.0.1" in text for text in said)


def test_without_any_server_left_the_run_ends_with_the_reason(theirs: Engines) -> None:
    engine = theirs({})
    ask(urls(engine)[0], "/behave", {"fail": 10**6})
    with pytest.raises(UserError, match=r"failed 4 times: .* 500: .*out of memory") as error:
        generate(engine, requests(2))
    assert "no other replica is left" in error.value.why
    with pytest.raises(UserError, match="failed 4 times"):
        engine.pause()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_is_started_again_and_answers_as_if_nothing_happened(
    ours: Engines, end: signal.Signals
) -> None:
    """The one that is new is sampled from when it has the current weights, not before."""
    engine, asked = ours(2, delay=0.05, answer_timeout=3.0), requests(8)
    assert engine.receive_weights("somewhere", 5)[0].received == {"w": 7}
    said, published = told(engine), []

    def publish() -> None:
        engine.interrupt()  # what is generated here to verify weights is not interrupted
        published.append(engine.receive_weights("somewhere", 5))
        canary = Request((9, 9), Sampling(3), NoiseKey(0, "canary"))
        as_undisturbed([canary], generate(engine, [canary]), 5)  # must not swallow what others wait for

    engine.on_restart = publish
    handles = [engine.submit(request) for request in asked]
    quick = engine.submit(Request((7,), Sampling(1), NoiseKey(0, "quick")))
    done = {r.handle: r for r in engine.wait()}
    assert set(done) == {quick}
    os.kill(pids(engine)[0], end)
    empty = 0
    while len(done) <= len(handles):
        found = engine.wait()
        empty += not found
        for result in found:
            assert result.handle not in done, "an answer twice"
            done[result.handle] = result
    assert empty <= 1  # the interruption ended one `wait`, unless that had something to return
    as_undisturbed(asked, [done[h] for h in handles], 5)
    assert engine.wait() == [] and len(published) == 1 and len(published[0]) == 2
    lost, again = said[-2:]
    assert lost.startswith("server ") and lost.endswith("sent again, from their beginning")
    assert ("SIGKILL" if end == signal.SIGKILL else "was silent for 3 s") in lost
    assert " was started again in " in again


def test_a_restart_without_anybody_who_gives_it_weights_is_an_error(ours: Engines) -> None:
    engine = ours(delay=0.05)
    engine.receive_weights("somewhere", 5)
    engine.submit(requests(1)[0])
    quick = engine.submit(Request((7,), Sampling(1), NoiseKey(0, "quick")))
    assert [r.handle for r in engine.wait()] == [quick]
    os.kill(pids(engine)[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="nothing can send them"):
        engine.wait()


def test_a_server_that_dies_again_and_again_ends_the_run(ours: Engines) -> None:
    engine = ours(restarts=1, fail=10**6)
    with pytest.raises(UserError, match="failed 4 times") as error:
        generate(engine, requests(1))
    assert "started again 1 times already" in error.value.why


def test_weights_for_a_server_that_dies_meanwhile_are_not_taken_for_received(ours: Engines) -> None:
    engine = ours()
    engine.receive_weights("somewhere", 1)
    os.kill(pids(engine)[0], signal.SIGKILL)
    with pytest.raises(WeightSyncError, match="while it took weights of version 2"):
        engine.receive_weights("somewhere", 2)
    engine.on_restart = lambda: engine.receive_weights("somewhere", 3)  # type: ignore[assignment,return-value]
    asked = requests(2)
    as_undisturbed(asked, generate(engine, asked), 3)


def test_new_weights_in_flight_leave_exact_spans_and_a_pause_nothing(ours: Engines) -> None:
    engine = ours(delay=0.02)
    (asked,) = requests(1, max_tokens=30)
    engine.submit(asked)
    quick = engine.submit(Request((7,), Sampling(4), NoiseKey(0, "quick")))
    assert [r.handle for r in engine.wait()] == [quick]
    engine.receive_weights("somewhere", 1)
    engine.pause()
    time.sleep(0.1)
    engine.receive_weights("somewhere", 2)
    engine.resume()
    (result,) = engine.wait()
    assert [s.version for s in result.spans] in ([0, 1, 2], [0, 2])
    assert [result.spans[0].start, result.spans[-1].end] == [0, 30]
    for span in result.spans:
        assert result.token_ids[span.start : span.end] == wanted(asked, span.version)[span.start : span.end]


def test_a_thread_that_waits_is_woken_and_sleeps_meanwhile(ours: Engines) -> None:
    engine = ours(delay=0.1)
    handle = engine.submit(requests(1, max_tokens=10)[0])
    thread = threading.Thread(target=lambda: [time.sleep(0.4), engine.interrupt()])
    thread.start()
    began, worked = time.monotonic(), time.thread_time()
    assert engine.wait() == []
    assert 0.35 < time.monotonic() - began < 0.9 and time.thread_time() - worked < 0.02
    thread.join()
    assert [r.handle for r in engine.wait()] == [handle]


def test_an_abort_gives_the_part_done_and_ends_what_was_never_sent(ours: Engines) -> None:
    engine = ours(delay=0.1)
    asked = [*requests(2, max_tokens=60), Request((8, 9), Sampling(8), NoiseKey(0, "train", 9))]
    handles = [engine.submit(r) for r in asked]
    quick = engine.submit(Request((7,), Sampling(2), NoiseKey(0, "quick")))
    assert [r.handle for r in engine.wait()] == [quick]
    never = engine.submit(asked[0])
    began = time.monotonic()
    parts = {r.handle: r for r in engine.abort([*handles[:2], never, 10**6])}
    assert time.monotonic() - began < 3, "aborting took as long as generating"
    assert set(parts) == {*handles[:2], never} and {r.finish_reason for r in parts.values()} == {"abort"}
    assert parts[never].token_ids == []
    for handle, request in zip(handles[:2], asked):
        done = len(parts[handle].token_ids)
        assert 0 < done < 60 and parts[handle].token_ids == wanted(request)[:done]
    assert [r.handle for r in engine.wait()] == handles[2:] and engine.abort(handles) == []


# --- what the user must mend ---


def test_two_runs_on_one_server_are_refused(theirs: Engines) -> None:
    engine = theirs({})
    url = urls(engine)[0]

    def second() -> None:
        VllmServerEngine(EngineModel(None, 64), servers=[url], launch=Launch(run_folder="runs/second")).close()

    with pytest.raises(UserError, match=f"samples for another run: its weights are '0 of .* {os.getpid()} '") as error:
        second()
    assert "give every run servers of its own" in error.value.fix
    ask(url, "/update_weight_version", {"new_version": "3 of elsewhere 1 runs/third"})
    with pytest.raises(UserError, match="was taken by another run: its weights are '3 of elsewhere 1 runs/third'"):
        generate(engine, requests(1))
    with pytest.raises(UserError, match="3 of elsewhere 1 runs/third"):
        second()
    ended = subprocess.Popen(["true"])
    ended.wait()
    for free in (f"3 of {socket.gethostname()} {ended.pid} runs/third", "3 of elsewhere 1 runs/second", "default"):
        ask(url, "/update_weight_version", {"new_version": free})
        second()
        assert ask(url, "/weight_info") == {"weight_version": "default"}, "a run that has ended keeps its server"


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ({"answered": "0.31.1"}, "runs vLLM 0.31.1"),
        ({"dev": False}, "VLLM_SERVER_DEV_MODE=1 is not set"),
        ({"scale_out": False}, "--enable-scale-out is not set"),
    ],
)
def test_servers_that_cannot_be_worked_with_are_refused(theirs: Engines, behaviour: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        theirs(behaviour)


def test_a_server_with_too_short_a_context_is_refused() -> None:
    port = free_port()
    peer = start_peer(port)
    try:
        with pytest.raises(UserError, match="takes 64 tokens, and this run's sequences have up to 100"):
            VllmServerEngine(EngineModel(None, 100), servers=[f"http://127.0.0.1:{port}"])
    finally:
        peer.kill()
    with pytest.raises(UserError, match=r"the server http://127.0.0.1:\d+ does not answer"):
        VllmServerEngine(EngineModel(None, 64), servers=[f"http://127.0.0.1:{port}"])


def test_an_address_where_nothing_is_said_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=f"the server {url} did not answer within 0.3 s"):
            VllmServerEngine(EngineModel(None, 64), servers=[url], supervision=Supervision(start_timeout=0.3))


def test_a_server_that_does_not_start_says_why(ours: Engines, model: Path) -> None:
    with pytest.raises(UserError, match=r"ended with exit status 3[^$]*ValueError: no room for the cache"):
        ours(exit="ValueError: no room for the cache")
    empty = model / "empty"
    empty.mkdir()
    python = interpreter(empty, exit="")
    Path(python).write_text("#!/bin/sh\n")
    with pytest.raises(UserError, match="vLLM is not installed in the environment of"):
        VllmServerEngine(EngineModel(model, 64), launch=Launch(python))
    with pytest.raises(UserError, match="does not run"):
        VllmServerEngine(EngineModel(model, 64), launch=Launch(str(model / "nothing")))


def test_without_aiohttp_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UserError, match=r"pip install 'hybridflow\[server\]'"):
        VllmServerEngine(EngineModel(None, 64), servers=["http://127.0.0.1:1"])


def test_no_server_outlives_its_engine_nor_its_process(ours: Engines, tmp_path: Path) -> None:
    engine = ours()
    (server,) = pids(engine)
    engine.close()
    assert not Path(f"/proc/{server}").exists()
    code = f"""
        import asyncio
        from pathlib import Path
        from hybridflow.rollout.served.process import start_server
        async def main():
            await start_server(["sh", "-c", "echo $$; sleep 1000 & sleep 1000"], {{}}, Path({str(tmp_path)!r}) / "log")
            await asyncio.sleep(1000)
        asyncio.run(main())
    """
    run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    log, until = tmp_path / "log", time.monotonic() + 60
    while not (log.is_file() and log.read_text().endswith("\n")):
        assert time.monotonic() < until
        time.sleep(0.05)
    group = int(log.read_text())
    os.killpg(group, 0)
    run.kill()
    run.wait()
    while any(status.split()[4] == str(group) for status in processes()):
        assert time.monotonic() < until, "something is left"
        time.sleep(0.05)


def processes() -> Iterator[str]:
    """The ``/proc/N/stat`` of all processes, without their names."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            yield "0 x " + path.read_text().rpartition(") ")[2]
