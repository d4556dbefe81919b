"""From ragged tokens to log-probabilities, through the model's own forward.

Shapes: T tokens of all sequences, M tokens that are scored (masked in), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.models.attention import PackedLayout, shared_beginnings


@dataclass(slots=True)
class TokenScores:
    """Scores of the M masked-in tokens of a batch.

    Args:
        index_M: where each stands on the batch's T axis.
        logp_M: log p(token | tokens before it).
        entropy_M: entropy of the distribution that the token was drawn from, in nats; None unless asked for.
    """

    index_M: Tensor
    logp_M: Tensor
    entropy_M: Tensor | None

    def named(self) -> dict[str, Tensor]:
        """The scores under the names that `TrainEngine.score` and the losses use."""
        return {"logp": self.logp_M} | ({} if self.entropy_M is None else {"entropy": self.entropy_M})


def score_tokens(
    model: PreTrainedModel, batch: Batch, *, temperature: float, entropy: Literal["no", "detached", "with gradient"]
) -> TokenScores:
    """One forward pass over a batch, packed without padding; logits only where a token is scored.

    Args:
        model: a model that `models.load` loaded.
        batch: ``input_ids_T`` and ``loss_mask_T``; with ``group_B``, sequences of one group share their prompt: it goes
            through the model once.
        temperature: divides the logits before the softmax.
        entropy: whether to compute the entropies too; "detached" spares their gradient.

    Raises:
        ValueError: a sequence's first token is masked in; nothing predicts it.
    """
    device = model.device
    offsets = batch.offsets["T"]
    index_M = batch["loss_mask_T"].nonzero()[:, 0]
    if torch.isin(offsets[:-1], index_M.cpu()).any():
        raise ValueError("the first token of a sequence is masked in, but nothing predicts it")
    input_ids_T = batch["input_ids_T"].to(device)
    shared = None
    if "group_B" in batch:
        shared = shared_beginnings(batch["input_ids_T"], offsets, batch["group_B"], beginnings(batch))
    layout = PackedLayout(batch.lengths(), device, shared=shared)
    predictor_M = index_M - 1
    logits_MV = model(
        input_ids=(input_ids_T if shared is None else input_ids_T[shared.token_U.to(device)])[None],
        position_ids=layout.position_ids,
        use_cache=False,
        logits_to_keep=(predictor_M if shared is None else shared.place_T[predictor_M]).to(device),
        layout=layout,
    ).logits[0]
    logits_MV = logits_MV.to(torch.promote_types(torch.float32, logits_MV.dtype))  # at least float32
    if temperature != 1.0:
        logits_MV = logits_MV / temperature
    logp_MV = torch.log_softmax(logits_MV, dim=-1)
    logp_M = logp_MV.gather(-1, input_ids_T[index_M.to(device)][:, None])[:, 0]
    entropy_M = None
    if entropy != "no":
        source_MV = logp_MV.detach() if entropy == "detached" else logp_MV
        entropy_M = -(source_MV.exp() * source_MV).sum(-1)
    return TokenScores(index_M, logp_M, entropy_M)


def beginnings(batch: Batch) -> Tensor:
    """``[B]``: how many tokens of each sequence come before its first scored one (the prompt); 0 if none is scored."""
    step_T = torch.arange(batch.total()) - batch.offsets["T"][batch.sequence_of()]
    step_T = torch.where(batch["loss_mask_T"], step_T, batch.lengths()[batch.sequence_of()])
    first_B = batch.lengths().scatter_reduce(0, batch.sequence_of(), step_T, "amin")
    return torch.where(first_B < batch.lengths(), first_B, 0)
