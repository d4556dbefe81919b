"""vLLM with worker processes: beside a process group, with weights that come from outside, killed and hung.

What every engine must do is in `test_conformance.py`, which runs these workers too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hybridflow.errors import UserError
from hybridflow.protocols.generation import Request, Result, Sampling, generate
from hybridflow.rollout.startup import EngineModel, Supervision
from hybridflow.rollout.vllm.engine import VllmEngine
from hybridflow.weights.channel import Channel, WeightRoute
from hybridflow.weights.stream import WeightSyncError, fingerprint, stream_of, verify

from conformance import CONTEXT, FAR, TOLERANCE, Setup, gap, model_of, requests


def begin(folder: Path, supervision: Supervision | None = None) -> Setup:
    model = model_of("qwen3")
    model.save_pretrained(folder)
    engine = VllmEngine(EngineModel(folder, CONTEXT, tensor_parallel=2), mode="workers", supervision=supervision)
    return Setup(engine, model, "vllm_workers")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """An engine in a process that runs torch.distributed, as one that trains does."""
    folder = tmp_path_factory.mktemp("workers")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    group = dist.group.WORLD
    setup = begin(folder)
    yield setup
    setup.engine.close()
    assert not multiprocessing.active_children()
    assert dist.group.WORLD is group, "the process group of the trainer was taken or replaced"
    one = torch.ones(1)
    dist.all_reduce(one)
    dist.destroy_process_group()


def worker_pids() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[tuple[Setup, Callable[[], list[int]]]]:
    """An engine to break, beside that of `setup`, and the processes of it alone."""
    others = worker_pids()
    setup = begin(tmp_path, Supervision(answer_timeout=10, restarts=2))
    yield setup, lambda: sorted(worker_pids() - others)
    setup.engine.close()
    assert worker_pids() <= others


@pytest.mark.vllm
def test_every_worker_takes_what_is_sent_to_it_and_says_so(setup: Setup):
    """As an actor in another process sends it: its `Channel`, and this engine's receipts."""
    setup.perturb(seed=1)
    stream = stream_of(setup.model)
    channel = Channel(setup.engine.receivers(), WeightRoute("shared_memory"))
    receipts = channel.publish(stream, lambda address: setup.engine.receive_weights(address, 7))
    channel.close()
    assert len(receipts) == 2
    for receipt in receipts:
        verify(stream, receipt, 7)
        assert receipt.num_bytes == sum(w.nbytes for w in setup.model.state_dict().values())
    asked = requests(3)
    results = generate(setup.engine, asked)
    assert gap(setup.model, asked, results) < TOLERANCE
    assert all(span.version == 7 for result in results for span in result.spans)


@pytest.mark.vllm
def test_what_workers_hold_whole_can_be_read_back(setup: Setup):
    setup.publish()
    held = setup.engine.read_back(list(setup.model.state_dict()))
    assert "model.norm.weight" in held and "model.layers.0.self_attn.q_proj.weight" not in held
    own = setup.model.state_dict()
    assert held == {name: fingerprint(own[name]) for name in held}
    setup.perturb(seed=2)
    assert all(held[name] != fingerprint(tensor) for name, tensor in setup.model.state_dict().items() if name in held)
    setup.publish()


@pytest.mark.vllm
def test_a_stream_that_fails_on_the_way_is_told_and_the_next_one_is_taken(setup: Setup):
    stream = stream_of(setup.model)
    tensors = stream.tensors

    def cut() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(iter(tensors))
        raise RuntimeError("the trainer ran out of memory")

    stream.tensors = cut()
    with pytest.raises(WeightSyncError, match="the trainer ran out of memory"):
        setup.engine.update_weights(stream, 99)
    setup.engine.submit(requests(1)[0])
    with pytest.raises(AssertionError, match="without usable weights"):
        setup.engine.wait()
    setup.publish()
    (result,) = setup.engine.wait()
    assert gap(setup.model, requests(1), [result]) < TOLERANCE


@pytest.mark.vllm
def test_workers_that_die_or_hang_are_replaced_and_nothing_is_lost(fragile: tuple[Setup, Callable[[], list[int]]]):
    setup, pids = fragile
    engine, told = setup.engine, []
    engine.note = lambda kind, text: told.append((kind, text))
    engine.on_restart = setup.publish
    before = setup.perturb(seed=3)
    setup.publish()
    asked = [replace(r, sampling=Sampling(60 + 30 * i)) for i, r in enumerate(requests(10))]
    undisturbed = generate(engine, asked)
    assert gap(before, asked, undisturbed) > FAR, "the weights of the start would not be noticed"

    disturbed = ask_all(engine, asked, pids()[1], signal.SIGKILL)
    assert [r.token_ids for r in disturbed] == [r.token_ids for r in undisturbed]
    assert gap(setup.model, asked, disturbed) < TOLERANCE
    assert [kind for kind, _ in told] == ["rollout_restart"]
    assert "requests are sent again" in told[0][1] and not told[0][1].endswith(" 0 requests are sent again")

    engine.on_restart = None  # nobody would publish: the engine must not go on with the weights of its start
    with pytest.raises(WeightSyncError, match="nothing publishes the current ones"):
        ask_all(engine, asked, pids()[0], signal.SIGSTOP)
    setup.publish()
    assert [r.token_ids for r in generate(engine, asked[:3])] == [r.token_ids for r in undisturbed[:3]]

    with pytest.raises(UserError, match="ended or hung too often"):
        ask_all(engine, asked, pids()[0], signal.SIGKILL)


def ask_all(engine: VllmEngine, asked: list[Request], pid: int, signal_number: int) -> list[Result]:
    """As `generate`, with a signal to a process after the first answer; no result may come twice."""
    handles = [engine.submit(r) for r in asked]
    done: dict[int, Result] = {}
    struck = None
    while len(done) < len(handles):
        if done and struck is None:
            struck = len(done)
            os.kill(pid, signal_number)
        for result in engine.wait():
            assert result.handle not in done
            done[result.handle] = result
    assert struck is not None and struck < len(handles), "all had been answered before the signal"
    return [done[handle] for handle in handles]


def test_processes_that_do_not_divide_the_heads_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 12, "num_key_value_heads": 4}))
    with pytest.raises(UserError) as error:
        VllmEngine(EngineModel(tmp_path, CONTEXT, tensor_parallel=3), mode="workers")
    assert str(error.value) == (
        "rollout.tensor_parallel 3 does not divide the model's heads\n"
        "  why: it has 12 attention heads and 4 of keys and values, of which every process takes as many\n"
        "  fix: set rollout.tensor_parallel to one of 1, 2, 4, 12"
    )
