"""What only a GPU can show: the packed kernel, bfloat16 compute, generation and training on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridflow.algorithms.aggregation import token_weights
from hybridflow.batch import Batch
from hybridflow.config.load import load_config
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.models.forward import score_tokens
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Sampling, generate
from hybridflow.protocols.training import Loss
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.trainers.rl.loop import estimate, next_groups, publish_weights, update
from hybridflow.trainers.rl.run import open_run
from hybridflow.weights.stream import receive, stream_of
from hybridflow.weights.transport import open_receiver, open_sender

from runs import configuration
from tiny import KINDS, VOCAB, packed_model, plain_model, ragged_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_scores_in_bfloat16_are_those_of_each_sequence_alone_in_float32(kind: str) -> None:
    """The varlen kernel, or what stands in for it, never looks across sequences."""
    model, batch = packed_model(kind).cuda(), ragged_batch((60, 33, 12, 5, 9, 40))
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        found = score_tokens(model, batch, temperature=1.0, entropy="no")
    alone = plain_model(kind).cuda()
    alone.set_attn_implementation("eager")
    for i, ids_T in enumerate(batch.rows("input_ids_T")):
        with torch.no_grad():
            logp_TV = alone(input_ids=ids_T[None].cuda()).logits[0].float().log_softmax(-1)
        expected_T = logp_TV[:-1].gather(-1, ids_T[1:, None].cuda())[:, 0]
        start, end = batch.offsets["T"][i : i + 2].tolist()
        mine = (found.index_M >= start) & (found.index_M < end)
        wanted = expected_T[(found.index_M[mine] - start - 1).cuda()]
        assert float((found.logp_M[mine.cuda()] - wanted).abs().mean()) < 0.05  # bfloat16 has 8 bits


def test_training_on_the_device_lowers_the_loss() -> None:
    engine = LocalEngine(packed_model(), OptimSection(lr=1e-2), total_steps=30, tokens_per_microbatch=64, device="cuda")
    batch = ragged_batch()
    batch["policy_weight_T"] = token_weights(batch, "token-mean", norm=1)
    losses = [engine.update(batch, Loss("cross_entropy")).metrics["actor/loss"] for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_what_was_sampled_scores_alike_in_the_trainer() -> None:
    model = packed_model().cuda()
    requests = [
        Request(tuple(torch.randint(VOCAB, (4 + i,)).tolist()), Sampling(24), NoiseKey(0, "train", i)) for i in range(8)
    ]
    results = generate(InlineEngine(model), requests)

    batch = Batch.from_rows(
        {
            "input_ids_T": [list(q.prompt_ids) + r.token_ids for q, r in zip(requests, results)],
            "loss_mask_T": [[False] * len(q.prompt_ids) + [True] * len(r.token_ids) for q, r in zip(requests, results)],
            "trajectory_B": list(range(8)),
        }
    )
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        scores = score_tokens(model, batch, temperature=1.0, entropy="no")
    sampled = torch.tensor([x for r in results for x in r.logps])
    assert float((scores.logp_M.cpu() - sampled).abs().mean()) < 0.03


def test_two_runs_on_the_device_are_alike() -> None:
    """Generation is stateless: the same requests in another company give the same tokens, but for near ties."""
    model = packed_model().cuda()
    requests = [Request((3, 5, 7 + i), Sampling(16), NoiseKey(1, "train", i)) for i in range(6)]
    together = generate(InlineEngine(model), requests)
    alone = [generate(InlineEngine(model), [r])[0] for r in requests]
    same = sum(a.token_ids == b.token_ids for a, b in zip(together, alone))
    assert same >= 5


def test_a_sleeping_engine_leaves_its_memory_to_training(tmp_path: Path) -> None:
    """vLLM and the trainer take turns on one device; free memory is that of the device, whoever holds it."""
    pytest.importorskip("vllm")
    rollout = {"engine": "vllm", "max_response_tokens": 8, "engine_args": {"gpu_memory_utilization": 0.3}}
    path = configuration(tmp_path, run={"device": "cuda"}, rollout=rollout, data={"eval": None})
    with open_run(load_config(path)) as run:
        assert run.turn.sleeps
        groups, _ = next_groups(run, 1)
        awake, total = torch.cuda.mem_get_info()
        batch, _ = estimate(run, groups)
        asleep, _ = torch.cuda.mem_get_info()
        assert asleep - awake > 0.2 * total
        update(run, batch)
        publish_weights(run, 1)
        again, _ = next_groups(run, 2)
        assert torch.cuda.mem_get_info()[0] == pytest.approx(awake, abs=0.05 * total)
        run.step = 1
        _, measured = estimate(run, again)
        assert measured.get("mismatch/abs_logp_diff/p50", 0.0) < 0.1  # it woke with the new weights


def test_what_is_offloaded_is_off_the_device_while_answers_are_generated(tmp_path: Path) -> None:
    sections = {"placement": {"pools": {"all": 1}}, "engine": {"strategy": "fsdp2", "offload": ["optimizer"]}}
    rollout = {"max_response_tokens": 8, "sleep": "always"}
    path = configuration(tmp_path, run={"device": "cuda"}, rollout=rollout, data={"eval": None}, **sections)
    with open_run(load_config(path)) as run:
        update(run, estimate(run, next_groups(run, 1)[0])[0])
        training = torch.cuda.memory_allocated()
        run.turn.to_generation()
        moments = 2 * 4 * 800_000  # of AdamW, for 0.8 million parameters
        assert training - torch.cuda.memory_allocated() > 0.9 * moments


def _receive_on_gpu(address: str, answers: Any) -> None:
    receiver = open_receiver(address, 0, timeout=60)
    for _ in range(2):
        stream, received = receiver.receive(), dict[str, int]()
        devices = {tensor.device.type for _, tensor in receive(stream, received)}
        answers.put((received, devices))
    receiver.close()


def test_weights_reach_another_process_of_the_gpu_by_handles_of_its_memory() -> None:
    """Buckets smaller than the model: each is filled again while the other process still has it open."""
    context = torch.multiprocessing.get_context("spawn")
    sender = open_sender("cuda_ipc", 1, device="cuda", bucket_bytes=4096, timeout=60)
    answers = context.Queue()
    process = context.Process(target=_receive_on_gpu, args=(sender.address, answers))
    process.start()
    for seed in range(2):
        stream = stream_of(packed_model(seed=seed).cuda())
        sender.send(stream)
        received, devices = answers.get(timeout=60)
        assert received == stream.published and devices == {"cuda"}
    process.join(60)
    sender.close()
    assert process.exitcode == 0
