"""What only a GPU can show: the packed kernel, bfloat16 compute, generation and training on the device."""

from __future__ import annotations

import pytest
import torch

from hybridflow.algorithms.aggregation import token_weights
from hybridflow.batch import Batch
from hybridflow.config.sections import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.models.forward import score_tokens
from hybridflow.noise import NoiseKey
from hybridflow.protocols import Loss, Request, Sampling, generate
from hybridflow.rollout.inline import InlineEngine

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
