"""The families of models that may run on packed sequences.

The tests compare the known families with Hugging Face's own forward: scores, gradients, generation. Any other family is
tried when it is loaded: its packed scores must equal those of its own forward for each sequence alone.

Shapes: T tokens of all sequences, M tokens that are scored, L tokens of one sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.modeling_utils import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.errors import UserError
from hybridflow.models.attention import ATTENTION
from hybridflow.models.forward import score_tokens

KNOWN = ("deepseek_v3", "gemma2", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
LAYERS = {"full_attention", "sliding_attention"}  # kinds of layers that layouts compute
PROBES = (13, 4, 29)  # lengths of the sequences that an unknown family is tried on
WINDOW = 6  # sliding windows during the trial: narrower than the sequences
TOLERANCE = 1e-4


def use_packing(model: PreTrainedModel) -> None:
    """Gives the model ragged attention; a family that is not known is tried first, where its weights are there.

    Raises:
        UserError: the family's attention is not covered, or its packed scores are not its own.
    """
    family = model.config.model_type
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    uncovered = [f"layers with {kind}" for kind in sorted(layers - LAYERS)]
    if not model._supports_attention_backend:
        uncovered.append("an attention of its own")
    if uncovered:
        raise _refusal(model, f"it has {', '.join(uncovered)}")
    if family in KNOWN or model.device.type == "meta":
        model.set_attn_implementation(ATTENTION)
        return
    difference = packing_error(model)
    if difference > TOLERANCE:
        raise _refusal(model, f"packed scores differ from its own by {difference:.2g}")


def packing_error(model: PreTrainedModel) -> float:
    """Returns the largest difference between packed scores and the model's own; it has ragged attention afterwards.

    In units of the scores' rounding: differences are divided by the size of the largest logit, where that is above 10.
    """
    words = model.config.get_text_config().vocab_size
    rng = torch.Generator().manual_seed(0)
    ids = [torch.randint(words, (length,), generator=rng) for length in PROBES]
    masks = [torch.arange(length) > 0 for length in PROBES]
    batch = Batch.from_rows({"input_ids_T": ids, "loss_mask_T": masks})
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _narrow_windows(model):
            model.set_attn_implementation("eager")
            logits = [model(input_ids=row[None].to(model.device), use_cache=False).logits[0] for row in ids]
            model.set_attn_implementation(ATTENTION)
            packed_M = score_tokens(model, batch, temperature=1.0, entropy="no").logp_M
    finally:
        model.train(training)
    own = [own_LV[:-1].cpu().log_softmax(-1).gather(-1, row[1:, None])[:, 0] for own_LV, row in zip(logits, ids)]
    largest = max(float(own_LV.abs().max()) for own_LV in logits)
    difference_M = (packed_M.cpu() - torch.cat(own)).abs()
    return float(torch.nan_to_num(difference_M, nan=torch.inf).max()) / max(1.0, largest / 10)


@contextmanager
def _narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Sets sliding windows to `WINDOW` tokens for the block, so that short sequences show whether windows are
    applied.
    """
    holders = [model.config, model.config.get_text_config(), *(m for m in model.modules() if m is not model)]
    found = [(h, h.sliding_window) for h in holders if _is_window(vars(h).get("sliding_window"))]
    try:
        for holder, _ in found:
            holder.sliding_window = WINDOW
        yield
    finally:
        for holder, window in found:
            holder.sliding_window = window


def _is_window(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refusal(model: PreTrainedModel, why: str) -> UserError:
    return UserError(
        f"{type(model).__name__} ({model.config.model_type}) cannot run on packed sequences: {why}",
        why="training would silently score another model than this one",
        fix="set model.packing=false (generate: --no-packing), or take one of the families known to pack: "
        + ", ".join(KNOWN),
    )
