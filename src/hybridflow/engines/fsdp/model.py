"""A model that is cut over processes, whether it is trained or only scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.config.sections.engine import ShardedSection
from hybridflow.engines.adam import matrices
from hybridflow.engines.fsdp.activations import kept_on_host
from hybridflow.engines.fsdp.fsdp1 import Fsdp1
from hybridflow.engines.fsdp.fsdp2 import Fsdp2
from hybridflow.engines.fsdp.ranks import Ranks, check_same_model
from hybridflow.engines.passes import Passes
from hybridflow.engines.scoring import TokenScorer
from hybridflow.models.ulysses import check_degree
from hybridflow.models.value import ValueHead
from hybridflow.weights.adapters import WRAPPED


class Sharding(Protocol):
    """The interface of the ways to cut a scorer over ranks: `Fsdp2`, `Fsdp1`."""

    root: torch.nn.Module

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Returns this rank's part of every parameter, by its name in the scorer."""
        ...

    def fill(self, source: Mapping[str, Tensor]) -> None:
        """Takes full weights and buffers from rank 0; `source` is empty on the others."""
        ...

    def no_sync(self) -> AbstractContextManager[None]:
        """Keeps the gradients of backward passes in the block on their rank."""
        ...

    def clip(self, parameters: Sequence[torch.nn.Parameter], most: float) -> float:
        """Scales the gradients down to a global norm of at most this; returns the norm before."""
        ...

    def reshard(self) -> None:
        """Frees the parameters that are still gathered."""
        ...

    def to(self, device: torch.device) -> None:
        """Moves the parameters."""
        ...

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the whole parameters, one after the other, by name in the scorer."""
        ...


STRATEGIES: dict[str, Callable[..., Sharding]] = {"fsdp2": Fsdp2, "fsdp1": Fsdp1}


class ShardedModel:
    """A model cut over the ranks of the default process group.

    Args:
        model: on rank 0 with its weights; on the others its tensors are not read, so they can be on the meta device.
            It is changed in place.
        section: how it is cut and computed.
        tokens_per_microbatch: most tokens in one forward pass; processes of one sequence-parallel group share them.
        device: of this rank.
        value_head: cut with the model.

    Raises:
        UserError: a degree divides neither the processes nor the heads; something that the strategy does not do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        section: ShardedSection,
        tokens_per_microbatch: int,
        device: torch.device | str = "cpu",
        value_head: ValueHead | None = None,
    ) -> None:
        self.model, self.section, self.device = model, section, torch.device(device)
        self.ranks = Ranks(section, self.device)
        if self.ranks.sp is not None:
            check_degree(model.config.get_text_config().num_attention_heads, self.ranks.sp_size)
        root = TokenScorer(model, value_head, self.ranks.sp)
        self.decayed = matrices(dict(root.named_parameters()))
        self.names = _names_of_each(model)
        source = {} if self.ranks.rank else dict(root.named_parameters()) | dict(root.named_buffers())
        check_same_model(self.ranks.gathered(_shapes(root)))
        _leave_memory(root)
        self.sharding = STRATEGIES[section.strategy](
            root,
            layers_of(model),
            mesh=self.ranks.mesh,
            section=section,
            compute=compute_dtype(section, self.device),
            device=self.device,
        )
        self.sharding.fill(source)
        self.passes = Passes(
            self.sharding.root,
            model,
            tokens_per_microbatch,
            self.device,
            within=kept_on_host if section.activation_offload else nullcontext,
            agree=self.ranks.largest,
            alike=True,
            no_sync=nullcontext if section.sync_every_microbatch else self.sharding.no_sync,
        )

    def score(self, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, Tensor]:
        """See `Scorer.score`; the columns are those of this rank's sequences."""
        scores = self.passes.score(batch, outputs, temperature)
        self.sharding.reshard()
        return scores

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Returns this rank's part of every parameter, by its Hugging Face name; of the value head, behind
        ``value_head.``
        """
        return {name.removeprefix("model."): p for name, p in self.sharding.parameters().items()}

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the whole parameters one after the other, under the same names; all ranks take them in lock step."""
        for name, tensor in self.sharding.full_tensors():
            yield name.removeprefix("model."), tensor

    def state(self, wanted: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields whole tensors of the model under these names: tied ones under each of theirs, and buffers that are
        saved.
        """
        for first, tensor in self.full_tensors():
            for name in self.names.get(first, ()):
                if name in wanted:
                    yield name, tensor
        for name, buffer in self.model.named_buffers():
            if name.replace(WRAPPED, "") in wanted:
                yield name.replace(WRAPPED, ""), buffer


def compute_dtype(section: ShardedSection, device: torch.device) -> torch.dtype:
    """Returns the type that products are computed in; auto is bfloat16 on an accelerator."""
    low = device.type != "cpu" if section.dtype == "auto" else section.dtype == "bfloat16"
    return torch.bfloat16 if low else torch.float32


def layers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Returns the modules whose parameters are gathered together: those that the model's class does not let be split.

    The rest (embeddings, the last norm, the output layer) is gathered as one.
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    kinds = set(plain._no_split_modules or ())
    return [module for module in plain.modules() if type(module).__name__ in kinds]


def _shapes(root: torch.nn.Module) -> str:
    """Returns a line for every tensor of a module: its name and shape."""
    tensors = [*root.named_parameters(), *root.named_buffers()]
    return "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors)


def _names_of_each(model: PreTrainedModel) -> dict[str, list[str]]:
    """Returns, for every tensor in the model's state, by its first name, all its names: tied ones have several."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names: dict[str, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(first.get(id(tensor), name), []).append(name)
    return names


def _leave_memory(root: torch.nn.Module) -> None:
    """Moves all tensors of a module to the meta device; parameters that are tied stay tied."""
    moved: dict[int, torch.nn.Parameter] = {}
    parameters = list(root.parameters())  # alive until the end, so that no id is used twice
    for module in root.modules():
        for name, p in module._parameters.items():
            if p is not None:
                empty = torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
                module._parameters[name] = moved.setdefault(id(p), empty)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="meta")
    del parameters
