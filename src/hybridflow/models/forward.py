"""From ragged tokens to log-probabilities, through the model's own forward.

Shapes: T tokens of all sequences, U that go through the model, M tokens that are scored (masked in), m of them on this
rank, B sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.errors import UserError
from hybridflow.models.attention import ATTENTION, PackedLayout, shared_beginnings
from hybridflow.models.head import output_head
from hybridflow.models.log_probs import Entropy, support_of, token_logps, token_moments
from hybridflow.models.padded import padded_states
from hybridflow.models.ulysses import SequenceParallel, SlicedLayout


@dataclass(slots=True)
class TokenScores:
    """Scores of the M masked-in tokens of a batch.

    Args:
        index_M: where each stands on the batch's T axis.
        logp_M: log p(token | tokens before it).
        entropy_M: entropy of the distribution that the token was drawn from, in nats; None unless asked for.
        value_M: value of the state before the token; None without a value head.
        sum_pi_squared_M: sum of the squared probabilities of that distribution; None unless asked for.
        log_mass_M: log-probability, over the whole vocabulary, of all words that the token was drawn from; None unless
            asked for.
    """

    index_M: Tensor
    logp_M: Tensor
    entropy_M: Tensor | None
    value_M: Tensor | None = None
    sum_pi_squared_M: Tensor | None = None
    log_mass_M: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Returns the scores under the names that `TrainEngine.score` and the losses use."""
        found = {
            "logp": self.logp_M,
            "entropy": self.entropy_M,
            "value": self.value_M,
            "sum_pi_squared": self.sum_pi_squared_M,
            "log_mass": self.log_mass_M,
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
    log_mass: bool = False,
    sp: SequenceParallel | None = None,
) -> TokenScores:
    """Computes the log-probabilities of the scored tokens in one forward pass; logits only where a token is scored.

    Args:
        model: a model that `models.load` loaded.
        batch: see `hidden_states`; with ``support_size_T`` and ``support_ids_K``, see `log_probs.support_of`.
        temperature: divides the logits before the softmax.
        entropy: whether to compute the entropies too; "detached" spares their gradient.
        value_head: reads the state's value from the same hidden states ``[M, D]``; None for none.
        sum_pi_squared: whether to compute the sums of squared probabilities too; without gradients only.
        log_mass: whether to compute the log mass of supports too; the output layer then runs once more, if there are
            any.
        sp: the ranks that share the pass, all with the same batch; each gets all scores. The gradients of a loss that
            all of them compute from these are then to be summed over the ranks.

    Raises:
        ValueError: a sequence's first token is masked in; nothing predicts it.
    """
    states = hidden_states(model, batch, sp=sp)
    hidden_mD, index_m = states.hidden_mD, states.index_m
    head, target_m = output_head(model), batch["input_ids_T"][index_m].to(hidden_mD.device)
    support = support_of(batch, index_m, hidden_mD.device)
    value_M = None if value_head is None else states.whole(value_head(hidden_mD))

    def log_masses(logp_m: Tensor) -> Tensor | None:
        if not log_mass:
            return None
        if support is None:
            return logp_m.new_zeros(len(states.index_M))
        with torch.no_grad():
            whole_m, _ = token_logps(hidden_mD, head, target_m, temperature=temperature)
            return states.whole(whole_m - logp_m.detach())

    if sum_pi_squared:
        assert not torch.is_grad_enabled(), "sums of squared probabilities have no gradient"
        moments = token_moments(hidden_mD, head, target_m, temperature=temperature, support=support)
        logp_M, entropy_M, squares_M = (states.whole(score_m) for score_m in moments)
        maybe_entropy_M = None if entropy == "no" else entropy_M
        return TokenScores(states.index_M, logp_M, maybe_entropy_M, value_M, squares_M, log_masses(moments[0]))
    logp_m, entropy_m = token_logps(
        hidden_mD, head, target_m, temperature=temperature, entropy=entropy, support=support
    )
    logp_M, maybe_entropy_M = states.whole(logp_m), None if entropy_m is None else states.whole(entropy_m)
    return TokenScores(states.index_M, logp_M, maybe_entropy_M, value_M, log_mass_M=log_masses(logp_m))


def score_values(
    model: PreTrainedModel,
    batch: Batch,
    value_head: Callable[[Tensor], Tensor],
    *,
    sp: SequenceParallel | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes ``index_M``, and the values ``[M]`` of the states before the scored tokens: without any logits.

    The arguments are those of `score_tokens`.
    """
    states = hidden_states(model, batch, sp=sp)
    return states.index_M, states.whole(value_head(states.hidden_mD))


@dataclass(slots=True)
class States:
    """The last hidden states before the scored tokens; where ranks share the tokens, each has its own.

    Args:
        hidden_mD: the states of this rank's m tokens, with a gradient.
        index_M: where each of all M scored tokens stands on the batch's T axis.
        own_m: which of the M this rank has; None: all of them.
        sp: the ranks; None for one process.
    """

    hidden_mD: Tensor
    index_M: Tensor
    own_m: Tensor | None = None
    sp: SequenceParallel | None = None

    @property
    def index_m(self) -> Tensor:
        """Where this rank's scored tokens stand on the T axis."""
        return self.index_M if self.own_m is None else self.index_M[self.own_m]

    def whole(self, score_m: Tensor) -> Tensor:
        """Gathers the ``[M]`` scores of all tokens from those of each rank."""
        if self.sp is None or self.own_m is None:
            return score_m
        return self.sp.whole(score_m, self.own_m.to(score_m.device), len(self.index_M))


def hidden_states(model: PreTrainedModel, batch: Batch, *, sp: SequenceParallel | None = None) -> States:
    """Computes the last hidden state before every scored token, in one forward pass packed without padding.

    A model that does not pack (``model.packing=false``) gets padded batches of similar lengths instead. A batch without
    sequences runs too, on one token that is not scored: the gradients are then zero.

    Args:
        model: a model that `models.load` loaded; its output layer is not run.
        batch: ``input_ids_T`` and ``loss_mask_T``; with ``group_B``, sequences of one group that begin with the same
            tokens, the same prompt for example, share that beginning: it goes through the model once.
        sp: the ranks that share the tokens; every rank calls with the same batch.

    Returns:
        The states. That of a token is the one of its predecessor, from which the token is predicted.

    Raises:
        ValueError: a sequence's first token is masked in; nothing predicts it.
        UserError: ranks share the tokens of a model that does not pack.
    """
    device = model.device
    offsets = batch.offsets["T"]
    index_M = batch["loss_mask_T"].nonzero()[:, 0]
    if torch.isin(offsets[:-1], index_M.cpu()).any():
        raise ValueError("the first token of a sequence is masked in, but nothing predicts it")
    ids_T, lengths, shared = batch["input_ids_T"], batch.lengths(), None
    if "group_B" in batch and len(batch) and packs(model):
        shared = shared_beginnings(offsets, *beginnings(batch))
    place_T = torch.arange(len(ids_T)) if shared is None else shared.place_T
    missing = (1 if sp is None else sp.size) - (len(ids_T) if shared is None else len(shared.token_U))
    if missing > 0:  # a sequence more, so that every rank has a token
        ids_T, lengths = F.pad(ids_T, (0, missing)), F.pad(lengths, (0, 1), value=missing)
        shared = None if shared is None else shared.with_more(missing)
    place_M = place_T[(index_M - 1).cpu()]
    if not packs(model):
        if sp is not None:
            raise UserError(
                f"the tokens of a padded {type(model).__name__} cannot be shared among {sp.size} processes",
                why="sequence parallelism exchanges the tokens of packed sequences for attention heads",
                fix="set engine.sequence_parallel=1, or model.packing=true where the model takes it",
            )
        return States(padded_states(trunk(model), ids_T.to(device), lengths)[place_M.to(device)], index_M)
    packed = PackedLayout(lengths, device, shared=shared)
    ids_U, own_m = ids_T if shared is None else ids_T[shared.token_U], None
    if sp is not None:
        start, stop = sp.bounds(len(ids_U))
        own_m = ((place_M >= start) & (place_M < stop)).nonzero()[:, 0]
        ids_U, place_M = ids_U[start:stop], place_M[own_m] - start
    layout = packed if sp is None else SlicedLayout(packed, sp)
    hidden_UD = trunk(model)(
        input_ids=ids_U.to(device)[None], position_ids=layout.position_ids, use_cache=False, layout=layout
    ).last_hidden_state[0]
    return States(hidden_UD[place_M.to(device)], index_M, own_m, sp)


def packs(model: PreTrainedModel) -> bool:
    """Returns whether the model takes sequences packed (see `models.attention`); the others take them padded."""
    return model.config._attn_implementation == ATTENTION


def trunk(model: PreTrainedModel) -> torch.nn.Module:
    """Returns a causal language model without its output layer; adapters inside it stay."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    return getattr(plain, plain.base_model_prefix)


def beginnings(batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns what sequences can share of a forward pass.

    The beginning of a sequence is all that comes before its first scored token: its prompt. It is empty if no token is
    scored. Sequences of one group begin alike if these tokens are the same, wherever they come from: responses to one
    prompt, or steps of an environment from one state.

    Returns:
        The length of each sequence's beginning ``[B]``, and a number that is equal for those of one group that begin
        alike ``[B]``.
    """
    step_T = torch.arange(batch.total()) - batch.offsets["T"][batch.sequence_of()]
    step_T = torch.where(batch["loss_mask_T"], step_T, batch.lengths()[batch.sequence_of()])
    first_B = batch.lengths().scatter_reduce(0, batch.sequence_of(), step_T, "amin")
    length_B = torch.where(first_B < batch.lengths(), first_B, 0)
    ids, starts = batch["input_ids_T"].numpy(), batch.offsets["T"][:-1].tolist()
    numbers: dict[tuple[int, bytes], int] = {}
    kinds = [
        numbers.setdefault((group, ids[start : start + length].tobytes()), len(numbers))
        for group, start, length in zip(batch["group_B"].tolist(), starts, length_B.tolist())
    ]
    return length_B, torch.tensor(kinds, dtype=torch.int64)
