"""vLLM's own server: right log-probabilities, exact spans, and nothing lost when it is killed, hangs or runs out of
memory. What every engine must do is asked in test_conformance.py, misbehaviour of all kinds in
tests/rollout/test_asynchronous.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from hybridflow.errors import UserError
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Sampling, generate
from hybridflow.rollout.startup import EngineModel, Launch, Supervision
from hybridflow.rollout.vllm.server import VllmServerEngine

from conformance import CONTEXT, FAR, TOLERANCE, Setup, decode, expected, gap, model_of, requests

pytestmark = pytest.mark.vllm


@dataclass
class Server(Setup):
    """A server of one run."""

    engine: VllmServerEngine
    said: list[tuple[float, str]] = field(default_factory=list)

    def processes(self) -> list[int]:
        """The server, and the process that computes."""
        (replica,) = self.engine._live
        guardian = replica.state.process._process.pid
        (server,) = _children(guardian)
        return [server, next(pid for pid in _children(server) if "resource_tracker" not in _command(pid))]


def _children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model")
    model = model_of("qwen3")
    model.save_pretrained(folder)
    engine = VllmServerEngine(
        EngineModel(folder, CONTEXT),
        launch=Launch(run_folder=folder),
        supervision=Supervision(answer_timeout=20),
        decode=decode,
    )
    setup = Server(engine, model, "vllm_server")
    engine.note = lambda kind, text: setup.said.append((time.monotonic(), text))
    yield setup
    engine.close()


def test_log_probs_are_those_of_the_weights_before_and_after_an_update(server: Server) -> None:
    asked = requests(6, 0.7)
    assert gap(server.model, asked, generate(server.engine, asked)) < TOLERANCE
    before = server.perturb(1)
    server.publish()
    results = generate(server.engine, asked)
    assert gap(server.model, asked, results) < TOLERANCE < FAR < gap(before, asked, results)
    assert {span.version for result in results for span in result.spans} == {1}
    held = server.engine.read_back(["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
    assert "model.norm.weight" in held


def test_new_weights_reach_what_is_in_flight_and_spans_are_exact(server: Server) -> None:
    long, short = requests(2, seed=9)
    long = replace(long, sampling=Sampling(300))
    handle = server.engine.submit(long)
    server.engine.submit(replace(short, sampling=Sampling(8)))
    assert [len(r.token_ids) for r in server.engine.wait()] == [8]
    old, before = server.version, server.perturb(seed=9)
    server.publish()  # without a pause: the engine makes its own
    (result,) = server.engine.wait()
    assert (result.handle, len(result.token_ids)) == (handle, 300)
    first, second = result.spans
    assert (first.version, second.version) == (old, old + 1) and 0 < first.end == second.start < second.end == 300
    logps, at = torch.tensor(result.logps), first.end
    assert (logps - expected(before, long, result))[:at].abs().max() < TOLERANCE
    assert (logps - expected(server.model, long, result))[at:].abs().max() < TOLERANCE


@pytest.mark.parametrize("fault", ["the server is killed", "the engine runs out of memory", "the engine hangs"])
def test_a_server_that_dies_or_hangs_answers_in_the_end_as_if_nothing_had_happened(server: Server, fault: str) -> None:
    server.engine.supervision = Supervision(answer_timeout=4.0 if fault == "the engine hangs" else 20.0)
    asked = [replace(r, sampling=Sampling(120)) for r in requests(8, seed=3)]
    undisturbed = [r.token_ids for r in generate(server.engine, asked)]
    published: list[float] = []

    def publish() -> None:
        published.append(time.monotonic())
        server.engine.supervision = Supervision(answer_timeout=20.0)
        server.publish()

    server.engine.on_restart = publish
    handles = [server.engine.submit(r) for r in asked]
    short = server.engine.submit(Request((5, 6, 7), Sampling(2), NoiseKey(0, "short")))
    done = {r.handle: r for r in server.engine.wait()}
    assert set(done) == {short}
    api, core = server.processes()
    server.said.clear()
    began = time.monotonic()
    os.kill(*{  # memory runs out in the process that has the model, and the kernel kills it
        "the server is killed": (api, signal.SIGKILL),
        "the engine runs out of memory": (core, signal.SIGKILL),
        "the engine hangs": (core, signal.SIGSTOP),
    }[fault])  # fmt: skip
    while len(done) <= len(handles):
        for result in server.engine.wait():
            assert result.handle not in done, "an answer twice"
            done[result.handle] = result
    assert [done[h].token_ids for h in handles] == undisturbed
    assert gap(server.model, asked, [done[h] for h in handles]) < TOLERANCE
    assert server.engine.wait() == [] and len(published) == 1
    noticed, (again, text) = next(at for at, what in server.said if "sent again" in what), server.said[-1]
    start = float(text.rpartition(" in ")[2].removesuffix(" s"))
    assert "was started again" in text
    assert published[0] - began - start < 10
    assert not any(Path(f"/proc/{pid}").exists() for pid in (api, core)), "the old server is still there"
    print(
        f"{fault}: noticed after {noticed - began:.1f} s, started in {start} s, all else {again - began - start:.1f} s"
    )


def test_a_running_server_is_taken_by_its_address_and_not_by_two_runs(server: Server) -> None:
    url, first = server.engine._live[0].state.url, Launch(run_folder=server.engine.log_folder)
    with pytest.raises(
        UserError, match=f"samples for another run: its weights are '{server.version} of .* {first.run_folder}"
    ):
        VllmServerEngine(EngineModel(None, CONTEXT), servers=[url], launch=Launch(run_folder="runs/second"))
    with pytest.raises(UserError, match=f"takes {CONTEXT} tokens, and this run's sequences have up to"):
        VllmServerEngine(EngineModel(None, CONTEXT + 1), servers=[url], launch=first)
    same = VllmServerEngine(EngineModel(None, CONTEXT), servers=[url], launch=first)
    try:
        assert (same.cache_block, same.receivers()) == (32, server.engine.receivers())
        asked = requests(3)
        assert gap(server.model, asked, generate(same, asked)) < TOLERANCE
    finally:
        same.close()


def test_the_server_says_why_it_does_not_start(tmp_path: Path, server: Server) -> None:
    server.model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"did not start: it ended with exit status [\s\S]*unrecognized"):
        VllmServerEngine(EngineModel(tmp_path, CONTEXT, engine_args={"no_such_argument": 1}))
    with pytest.raises(UserError, match="sets 'logprobs_mode' itself"):
        VllmServerEngine(EngineModel(tmp_path, CONTEXT, engine_args={"logprobs_mode": "raw_logprobs"}))
