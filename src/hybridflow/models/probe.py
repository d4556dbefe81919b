"""A probe: a few sequences on which a model that was written is compared with the one that was trained.

Shapes: T tokens of all sequences, M of them that are scored.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.errors import UserError
from hybridflow.models.forward import score_tokens

LENGTHS = (13, 4, 29)
ROUNDING = 1e-4  # of log-probabilities in float32, from the order of sums; for each 10 of the largest of them
SHARE = 0.05  # of the change that training made to them


def probe_scores(model: PreTrainedModel) -> Tensor:
    """Computes log-probabilities of the probe's tokens, and entropies of the distributions that they are from
    ``[2, M]``.
    """
    words, rng = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)
    ids = [torch.randint(words, (length,), generator=rng) for length in LENGTHS]
    batch = Batch.from_rows({"input_ids_T": ids, "loss_mask_T": [torch.arange(n) > 0 for n in LENGTHS]})
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            scores = score_tokens(model, batch, temperature=1.0, entropy="detached")
    finally:
        model.train(training)
    assert scores.entropy_M is not None
    return torch.stack([scores.logp_M, scores.entropy_M]).float().cpu()


def require_same(what: str, found: Tensor, trained: Tensor, before: Tensor) -> None:
    """Compares the scores of a model with those of the trained one.

    Args:
        what: names the model in the message.
        found: its `probe_scores`.
        trained: those of the trained model.
        before: those of the model that training began with: the change that training made must not be lost in a
            difference.

    Raises:
        UserError: they differ by more than rounding, and by more than a small share of what training did.
    """
    apart, moved = (float(torch.nan_to_num((a - trained).abs(), nan=torch.inf).max()) for a in (found, before))
    rounding = ROUNDING * max(1.0, float(torch.nan_to_num(trained).abs().max()) / 10)
    if not apart <= max(rounding, SHARE * moved):
        raise UserError(
            f"{what} is not the trained one: log-probabilities differ by {apart:.2g} on a probe, training moved them "
            f"by {moved:.2g}",
            why="nothing was written, for another program would load another model than the one that was trained",
            fix="write the adapters alone (hybridflow export RUN FOLDER --adapter), and train with other "
            "model.lora.target_modules",
        )
