"""From ragged tokens to log-probabilities, through the model's own forward.

Shapes: T tokens of all sequences, M tokens that are scored (masked in), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.models.attention import ATTENTION, PackedLayout, shared_beginnings
from hybridflow.models.head import output_head
from hybridflow.models.log_probs import Entropy, support_of, token_logps, token_moments
from hybridflow.models.padded import padded_states


@dataclass(slots=True)
class TokenScores:
    """Scores of the M masked-in tokens of a batch.

    Args:
        index_M: where each stands on the batch's T axis.
        logp_M: log p(token | tokens before it).
        entropy_M: entropy of the distribution that the token was drawn from, in nats; None unless asked for.
        value_M: value of the state before the token; None without a value head.
        sum_pi_squared_M: sum of the squared probabilities of that distribution; None unless asked for.
    """

    index_M: Tensor
    logp_M: Tensor
    entropy_M: Tensor | None
    value_M: Tensor | None = None
    sum_pi_squared_M: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """The scores under the names that `TrainEngine.score` and the losses use."""
        found = {
            "logp": self.logp_M,
            "entropy": self.entropy_M,
            "value": self.value_M,
            "sum_pi_squared": self.sum_pi_squared_M,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def score_tokens(
    model: PreTrainedModel,
    batch: Batch,
    *,
    temperature: float,
    entropy: Entropy,
    value_head: Callable[[Tensor], Tensor] | None = None,
    sum_pi_squared: bool = False,
) -> TokenScores:
    """Log-probabilities of the scored tokens, from one forward pass; logits only where a token is scored.

    Args:
        model: a model that `models.load` loaded.
        batch: see `hidden_states`; with ``support_size_T`` and ``support_ids_K``, see `log_probs.support_of`.
        temperature: divides the logits before the softmax.
        entropy: whether to compute the entropies too; "detached" spares their gradient.
        value_head: reads the state's value from the same hidden states ``[M, D]``; None for none.
        sum_pi_squared: whether to compute the sums of squared probabilities too; without gradients only.

    Raises:
        ValueError: a sequence's first token is masked in; nothing predicts it.
    """
    hidden_MD, index_M = hidden_states(model, batch)
    head, target_M = output_head(model), batch["input_ids_T"][index_M].to(hidden_MD.device)
    support = support_of(batch, index_M, hidden_MD.device)
    value_M = None if value_head is None else value_head(hidden_MD)
    if sum_pi_squared:
        assert not torch.is_grad_enabled(), "sums of squared probabilities have no gradient"
        logp_M, entropy_M, squares_M = token_moments(
            hidden_MD, head, target_M, temperature=temperature, support=support
        )
        return TokenScores(index_M, logp_M, None if entropy == "no" else entropy_M, value_M, squares_M)
    logp_M, maybe_entropy_M = token_logps(
        hidden_MD, head, target_M, temperature=temperature, entropy=entropy, support=support
    )
    return TokenScores(index_M, logp_M, maybe_entropy_M, value_M)


def hidden_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The last hidden state before every scored token, from one forward pass packed without padding.

    A model that does not pack (``model.packing=false``) gets padded batches of similar lengths instead.

    Args:
        model: a model that `models.load` loaded; its output layer is not run.
        batch: ``input_ids_T`` and ``loss_mask_T``; with ``group_B``, sequences of one group share their prompt: it goes
            through the model once.

    Returns:
        ``hidden_MD``, with a gradient, and ``index_M``: where each scored token stands on the T axis. The state of a
        token is that of its predecessor, from which the token is predicted.

    Raises:
        ValueError: a sequence's first token is masked in; nothing predicts it.
    """
    device = model.device
    offsets = batch.offsets["T"]
    index_M = batch["loss_mask_T"].nonzero()[:, 0]
    if torch.isin(offsets[:-1], index_M.cpu()).any():
        raise ValueError("the first token of a sequence is masked in, but nothing predicts it")
    input_ids_T = batch["input_ids_T"].to(device)
    if not packs(model):
        return padded_states(trunk(model), input_ids_T, batch.lengths())[(index_M - 1).to(device)], index_M
    shared = None
    if "group_B" in batch:
        shared = shared_beginnings(batch["input_ids_T"], offsets, batch["group_B"], beginnings(batch))
    layout = PackedLayout(batch.lengths(), device, shared=shared)
    hidden_TD = trunk(model)(
        input_ids=(input_ids_T if shared is None else input_ids_T[shared.token_U.to(device)])[None],
        position_ids=layout.position_ids,
        use_cache=False,
        layout=layout,
    ).last_hidden_state[0]
    predictor_M = index_M - 1
    return hidden_TD[(predictor_M if shared is None else shared.place_T[predictor_M]).to(device)], index_M


def packs(model: PreTrainedModel) -> bool:
    """Whether the model takes sequences packed (see `models.attention`); the others take them padded."""
    return model.config._attn_implementation == ATTENTION


def trunk(model: PreTrainedModel) -> torch.nn.Module:
    """A causal language model without its output layer; adapters inside it stay."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    return getattr(plain, plain.base_model_prefix)


def beginnings(batch: Batch) -> Tensor:
    """``[B]``: how many tokens of each sequence come before its first scored one (the prompt); 0 if none is scored."""
    step_T = torch.arange(batch.total()) - batch.offsets["T"][batch.sequence_of()]
    step_T = torch.where(batch["loss_mask_T"], step_T, batch.lengths()[batch.sequence_of()])
    first_B = batch.lengths().scatter_reduce(0, batch.sequence_of(), step_T, "amin")
    return torch.where(first_B < batch.lengths(), first_B, 0)
