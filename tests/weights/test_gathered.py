"""Models that are cut over processes publish what the whole model would, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridflow.weights.stream import fingerprint, stream_of, weight_names

from on_ranks import weights
from ranks import shared_ranks
from tiny import packed_model


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_two_ranks_publish_the_bits_of_the_whole_model(kind: str) -> None:
    """Tied embeddings, fused experts, and a router's buffer."""
    names = weight_names(packed_model(kind))
    assert shared_ranks(2).run(weights.gathered_as_the_whole_model, kind, (2,)) == [len(names)] * 2
    wanted = {"qwen3": "lm_head.weight", "qwen3_moe": "experts.gate_up_proj", "deepseek_v3": "e_score_correction_bias"}
    assert any(name.endswith(wanted[kind]) for name in names)


def test_four_ranks_with_two_copies_publish_them_too() -> None:
    shared_ranks(4).run(weights.gathered_as_the_whole_model, "qwen3", (2, 2))


def test_adapters_of_a_model_that_is_cut_leave_alone_and_merged() -> None:
    shared_ranks(2).run(weights.adapters_of_sharded, (2,))


def test_tied_weights_leave_one_after_the_other_as_one_tensor() -> None:
    model = packed_model()
    assert model.config.tie_word_embeddings
    leaving = iter(stream_of(model).tensors)
    (first, one), (second, other) = next(leaving), next(leaving)
    assert {first, second} == {"model.embed_tokens.weight", "lm_head.weight"} and one is other


def test_parameters_are_published_in_another_type_and_buffers_are_not() -> None:
    model = packed_model("deepseek_v3")
    buffers = {name for name, _ in model.named_buffers()}
    stream = stream_of(model, dtype=torch.bfloat16)
    kept = set()
    for name, tensor in stream.tensors:
        assert stream.published[name] == fingerprint(tensor)
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype))
        if tensor.dtype == torch.float32:
            kept.add(name)
    assert kept == {name for name in stream.names if name in buffers} and kept


def test_an_engine_may_gather_by_itself() -> None:
    """As FSDP1 must, whose parameters are pieces of one flat tensor."""
    model, asked = weights.with_adapters(packed_model()), []
    names = list(model.state_dict())

    def gather(wanted: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        asked.append(wanted)
        for name in reversed(names):  # an adapter before its weight
            if name in wanted:
                yield name, model.state_dict()[name]

    for lora in (None, "adapters", "merged"):
        expected = weights.consumed(model, lora=lora)[0]
        tensors = weights.consumed(model, lora=lora, names=names, gather=gather)[0]
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    assert len(asked[1]) == len([n for n in names if "lora_" in n]) < len(asked[2]) == len(names)


MEMORY = """
import json, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hybridflow.weights.buckets import pack
from hybridflow.weights.stream import stream_of

def high_water():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

rank = int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(12)])
for layer in model:
    fully_shard(layer, mesh=mesh)
bucket = torch.zeros(1 << 22, dtype=torch.uint8)
peaks = []
for count in (1, 12):  # one tensor first, then twelve
    stream = stream_of(model[:count])
    open("/proc/self/clear_refs", "w").write("5")
    before = high_water()
    for _ in pack(stream, lambda: bucket):
        pass
    peaks.append(high_water() - before)
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_publishing_a_model_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """Beside the bucket: the whole tensor, and what the collective gathers it with. However many tensors there are."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves the process at once
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEMORY, str(tmp_path / "store"), str(rank)],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        out, _ = process.communicate(timeout=120)
        one, twelve = json.loads(out)
        tensor = 2048 * 2048 * 4
        assert tensor <= one <= 3.5 * tensor and twelve <= one + tensor // 4, (one, twelve)
