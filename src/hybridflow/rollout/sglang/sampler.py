"""Our noise inside SGLang: its schedulers draw tokens as the inline engine does.

SGLang takes a seed per request only in its deterministic mode, which has no attention kernels for CPUs, is slower on
GPUs, and ends the scheduler when a seeded request has min-p. `install` replaces two methods in a scheduler process:

- ``SamplingBatchInfo.from_schedule_batch`` puts every request's seed beside its temperature, in any mode;
- ``Sampler._sample_from_probs`` draws with `noise.gumbel` where there are seeds, from what `sampling.kept` leaves.

A seed is the request's noise, moved so that SGLang's positions, which count from the beginning of the prompt, give the
noise of positions counted over the sampled tokens of the sequence: see `seed_of`. Tokens are then those of the inline
engine up to rounding, whatever they are batched with; continued requests and later turns continue their own noise.
The order of filters is ours as well (SGLang's top-p ignores what top-k left).

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from hybridflow.noise import gumbel, moved
from hybridflow.protocols.generation import Request, Sampling
from hybridflow.rollout.sampling import kept

MOST_KEPT = 1 << 20  # ids of one token's support that SGLang may return: no vocabulary is larger


def seed_of(request: Request) -> int:
    """Returns the ``sampling_seed`` of a request, continued or not, of any turn."""
    return moved(request.noise.bits(), len(request.prompt_ids) - 1 - request.position)


def install() -> None:
    """Replaces SGLang's sampling in this process, once."""
    from sglang.srt.layers.sampler import Sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    if getattr(Sampler, "hybridflow_noise", False):
        return
    prepared, packed = SamplingBatchInfo.from_schedule_batch.__func__, Sampler._build_sampling_mask_output

    def from_schedule_batch(cls: type[Any], batch: Any, vocab_size: int) -> Any:
        info = prepared(cls, batch, vocab_size)
        seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
        # Requests of other programs have no seeds; a batch that is joined from parts has seeds for all rows, or for
        # none.
        some = [random.getrandbits(63) if seed is None else seed for seed in seeds]
        info.sampling_seed = torch.tensor(some, dtype=torch.int64).to(info.temperatures.device, non_blocking=True)
        return info

    def sample_from_probs(self: Any, probs_RV: Tensor, info: Any, positions_R: Tensor, simple: bool) -> Any:
        weights_RV = probs_RV if simple else probs_RV * _kept(probs_RV, info)
        noise_RV = gumbel(info.sampling_seed, positions_R.long(), probs_RV.shape[1])
        token_R = (weights_RV.log() + noise_RV).argmax(-1)
        return token_R.int(), _capture(weights_RV, token_R, info.sampling_mask_batch_indices)

    def build_sampling_mask_output(self: Any, tokens: Tensor, capture: Any, logprobs: Tensor | None) -> Any:
        # Pack as many as the largest row has, not as many as the limit, which would be packed for every row.
        self.sampling_mask_max_tokens = int((capture.weights > 0).sum(-1).max())
        return packed(self, tokens, capture, logprobs)

    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)
    Sampler._sample_from_probs = sample_from_probs
    Sampler._build_sampling_mask_output = build_sampling_mask_output
    Sampler.hybridflow_noise = True


def _kept(probs_RV: Tensor, info: Any) -> Tensor:
    """Returns the tokens that the rows' filters keep."""
    vocab = probs_RV.shape[1]
    filters = zip(info.top_ks.tolist(), info.top_ps.tolist(), info.min_ps.tolist())
    samplings = [Sampling(0, top_p=p, top_k=k if k < vocab else 0, min_p=m) for k, p, m in filters]
    return kept(probs_RV.log(), samplings)


def _capture(weights_RV: Tensor, token_R: Tensor, rows: Tensor | None) -> Any:
    """Returns what SGLang returns as sampling masks, for the rows that ask for it."""
    if rows is None:
        return None
    from sglang.srt.layers.sampler import _SamplingMaskCapture

    weights = weights_RV.index_select(0, rows)
    selected = weights.gather(1, token_R.index_select(0, rows)[:, None])[:, 0]
    return _SamplingMaskCapture(weights=weights, token_ids=None, selected_weight=selected, batch_rows=rows)
