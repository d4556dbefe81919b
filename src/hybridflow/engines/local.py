"""Training in this process, on one device."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.batch import Batch
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.adam import AdamEngine, matrices
from hybridflow.engines.background import Background, host_copies, host_twin
from hybridflow.engines.fsdp.ranks import check_parts
from hybridflow.engines.passes import Dtype, Passes, autocast_on
from hybridflow.engines.reference import WithoutAdapters
from hybridflow.engines.scoring import TokenScorer
from hybridflow.engines.shards import MOMENTS, PLAIN, SHARDS, read_state, require_kind
from hybridflow.models.files import export_model, read_weights, write_weights
from hybridflow.models.load import stop_ids
from hybridflow.models.lora import has_adapters
from hybridflow.models.value import ValueHead, read_value_head, write_value_head
from hybridflow.protocols.training import Loss, TrainEngine, Update
from hybridflow.protocols.weights import WeightStream
from hybridflow.weights.stream import stream_of


class LocalEngine(AdamEngine, TrainEngine):
    """A `TrainEngine` around one model: AdamW on float32 master weights, products in bfloat16 where that is asked for.

    Args:
        model: a model that `models.load` loaded; parameters that require no gradient are left alone (LoRA).
        optim: optimizer and schedule.
        total_steps: optimizer steps of the whole run, for the schedule's decay.
        tokens_per_microbatch: most tokens in one forward pass.
        device: where to train.
        value_head: trained with the model; it computes the "value" scores. It makes the model a critic, or an actor
            whose trunk is the critic's too. Its weights are not streamed.
        name: the prefix of its metrics.
        dtype: the type of products, see ``engine.dtype``; auto is bfloat16 on a GPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optim: OptimSection,
        *,
        total_steps: int,
        tokens_per_microbatch: int,
        device: torch.device | str = "cpu",
        value_head: ValueHead | None = None,
        name: Literal["actor", "critic"] = "actor",
        dtype: Dtype = "auto",
    ) -> None:
        self.model = model.to(device).train()
        self.value_head = None if value_head is None else value_head.to(device)
        self.device = torch.device(device)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if value_head is not None:
            trained |= {f"value_head.{n}": p for n, p in value_head.named_parameters()}
        super().__init__(trained, optim, decayed=matrices(trained), total_steps=total_steps, name=name)
        self.writing = Background()
        self.dtype, within = dtype, autocast_on(self.device, dtype)
        self.passes = Passes(TokenScorer(model, value_head), model, tokens_per_microbatch, self.device, within=within)

    def score(self, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, Tensor]:
        """See `TrainEngine.score`."""
        return self.passes.score(batch, outputs, temperature)

    def update(self, batch: Batch, loss: Loss, *, rows: Sequence[int] | None = None) -> Update:
        """See `TrainEngine.update`; and `ShardedEngine.update` of `rows`, which are of one place here."""
        if rows is not None:
            check_parts([len(batch)], rows)
        if not len(batch):
            return Update({})  # no sequence carries loss: no step, and the schedule stands still
        self.optimizer.zero_grad(set_to_none=True)
        sums = self.passes.accumulate(batch, loss)
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained.values(), self.optim.clip_grad_norm))
        return self.step(sums, norm)

    def weights(self) -> dict[str, Tensor]:
        """Returns the tensors of a checkpoint: adapters alone where they are trained, else parameters and buffers, each
        once.
        """
        if has_adapters(self.model):
            return {name: p.detach() for name, p in self.trained.items()}
        return {n: t.detach() for n, t in (self.published() | self.trained).items()}

    def published(self) -> dict[str, Tensor]:
        """See `AdamEngine.published`."""
        saved = self.model.state_dict().keys()
        own: dict[str, Tensor] = dict(self.model.named_parameters())
        return own | {n: b for n, b in self.model.named_buffers() if n in saved}

    def save(self, folder: Path, *, background: bool = False) -> None:
        """See `TrainEngine.save`. Everything is in open formats: safetensors, and JSON for plain values."""
        self.require_finite(self.weights(), "and are not saved")
        model, head, steps_done = self.model, self.value_head, self.steps_done
        weights = dict(model.state_dict())
        moments = {f"{kind}/{name}": t for name, kept in self.moments().items() for kind, t in kept.items()}
        if background:
            weights, head, moments = host_copies(weights), copy.deepcopy(head), host_copies(moments)
            model = host_twin(model, weights)
        if not has_adapters(self.model):
            (folder / "model").mkdir()

        def write() -> None:
            write_weights(model, folder, weights)
            if head is not None:
                write_value_head(head, folder)
            save_file({key: t.detach().cpu().contiguous() for key, t in moments.items()}, folder / MOMENTS)
            (folder / PLAIN).write_text(json.dumps({"steps_done": steps_done}))

        if background:
            self.writing.start(write)
        else:
            write()

    def saved(self, *, wait: bool) -> bool:
        """See `TrainEngine.saved`."""
        return self.writing.done(wait=wait)

    def load(self, folder: Path) -> None:
        """See `TrainEngine.load`."""
        weights = self.weights()
        require_kind(folder, adapters=has_adapters(self.model))
        if (folder / SHARDS).is_dir():
            moments = read_state(folder / SHARDS, weights, source=folder)
        else:
            read_weights(self.model, folder)
            if self.value_head is not None:
                read_value_head(self.value_head, folder)
            moments = read_state(folder, weights, source=folder, weights_too=False)
        self.optimizer.state.clear()
        for name, kept in moments.items():
            self.optimizer.state[self.trained[name]] = kept
        self.steps_done = json.loads((folder / PLAIN).read_text())["steps_done"]

    def export(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """See `TrainEngine.export`."""
        export_model(self.model, folder, dtype)

    def stream_weights(self, *, lora: Literal["adapters", "merged"] | None = None) -> WeightStream:
        """See `TrainEngine.stream_weights`."""
        return stream_of(self.model, same_memory=lora is None, lora=lora)

    def without_adapters(self) -> WithoutAdapters:
        """See `TrainEngine.without_adapters`."""
        return WithoutAdapters(self, self.model)

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """See `TrainEngine.stop_ids`."""
        return stop_ids(self.model, tokenizer)

    def to(self, where: Literal["device", "host"]) -> None:
        """See `TrainEngine.to`."""
        target = self.device if where == "device" else torch.device("cpu")
        self.model.to(target)
        if self.value_head is not None:
            self.value_head.to(target)
        self.move_moments(target)
