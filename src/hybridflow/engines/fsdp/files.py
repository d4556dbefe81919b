"""The files that a sharded engine writes into a checkpoint, and how it reads those of any engine of the same model.

shards/                 weights and AdamW's moments, see `engines.shards`; of adapters, theirs alone
model/config.json       and what else stands beside a model's weights, where all of them are trained
engine.json             optimizer steps done
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.config.sections.engine import ShardedSection
from hybridflow.engines.background import Background, host_copies
from hybridflow.engines.fsdp.fsdp2 import from_first
from hybridflow.engines.fsdp.model import ShardedModel
from hybridflow.engines.fsdp.ranks import Ranks
from hybridflow.engines.shards import PLAIN, SHARDS, Moments, read_state, require_kind, write_shards
from hybridflow.errors import UserError
from hybridflow.models.files import files_beside_weights, read_adapters, read_model, require_same_shapes, write_streamed
from hybridflow.models.lora import has_adapters
from hybridflow.models.value import ValueHead, read_value_tensors
from hybridflow.protocols.weights import WeightStream
from hybridflow.weights.adapters import adapted_weights


class Engine(Protocol):
    """The parts of a sharded engine that files read and restore (`engines.fsdp.engine.ShardedEngine`).

    Attributes:
        model: the module, with this rank's pieces in it.
        sharded: how it is cut.
        section: the same, as the configuration says it.
        value_head: of a critic.
        device: of this rank.
        ranks: all of them.
        trained: this rank's pieces of what is trained, by name.
        optimizer: AdamW over these.
        steps_done: optimizer steps.
    """

    model: PreTrainedModel
    sharded: ShardedModel
    section: ShardedSection
    value_head: ValueHead | None
    device: torch.device
    ranks: Ranks
    trained: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.AdamW
    steps_done: int

    def moments(self) -> Moments:
        """Returns AdamW's state, by parameter name."""
        ...

    def stream_weights(self, *, lora: Literal["adapters", "merged"] | None = None) -> WeightStream:
        """See `TrainEngine.stream_weights`."""
        ...


class State(Protocol):
    """This rank's pieces of an engine's tensors, as DTensors by name: `Fsdp2State`, `Fsdp1State`."""

    def weights(self) -> dict[str, Tensor]:
        """Returns parameters, and buffers that are saved; tied ones under their first name."""
        ...

    def moments(self) -> Moments:
        """Returns AdamW's state, by parameter name."""
        ...

    def put(self, weights: Mapping[str, Tensor], moments: Moments) -> None:
        """Takes over these tensors: weights that `weights` gave and that were then filled, and moments cut in the same
        way.
        """
        ...


class Fsdp2State:
    """Pieces of an engine whose parameters are DTensors: these tensors themselves."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def weights(self) -> dict[str, Tensor]:
        """See `State.weights`."""
        own: dict[str, Tensor] = {name: p.detach() for name, p in self.engine.sharded.parameters().items()}
        buffers = {name: b for name, b in self.engine.model.named_buffers() if name in self.engine.sharded.names}
        return own | buffers

    def moments(self) -> Moments:
        """See `State.moments`."""
        return self.engine.moments()

    def put(self, weights: Mapping[str, Tensor], moments: Moments) -> None:
        """See `State.put`."""
        self.engine.optimizer.state.clear()
        for name, kept in moments.items():
            self.engine.optimizer.state[self.engine.trained[name]] = kept


class Fsdp1State:
    """Pieces of an engine whose parameters are views of flat tensors: as FSDP1 cuts them anew for its checkpoints."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.root = engine.sharded.sharding.root

    def weights(self) -> dict[str, Tensor]:
        """See `State.weights`."""
        wanted = self.engine.sharded.names.keys() | self.engine.sharded.parameters().keys()
        return {name: tensor for name, tensor in self._state_dict().items() if name in wanted}

    def moments(self) -> Moments:
        """See `State.moments`."""
        with _fsdp1_state(self.root):
            found = FullyShardedDataParallel.optim_state_dict(self.root, self.engine.optimizer)
        return {name.removeprefix("model."): kept for name, kept in found["state"].items()}

    def put(self, weights: Mapping[str, Tensor], moments: Moments) -> None:
        """See `State.put`."""
        names = {alias: first for first, aliases in self.engine.sharded.names.items() for alias in aliases}
        every = {name: weights.get(names.get(name, name), own) for name, own in self._state_dict().items()}
        with _fsdp1_state(self.root):
            self.root.load_state_dict({_scorer_name(name): tensor for name, tensor in every.items()})
            groups = FullyShardedDataParallel.optim_state_dict(self.root, self.engine.optimizer)["param_groups"]
            state = {_scorer_name(name): kept for name, kept in moments.items()}
            found = FullyShardedDataParallel.optim_state_dict_to_load(
                self.root, self.engine.optimizer, {"state": state, "param_groups": groups}
            )
            self.engine.optimizer.load_state_dict(found)

    def _state_dict(self) -> dict[str, Tensor]:
        with _fsdp1_state(self.root):
            return {name.removeprefix("model."): tensor for name, tensor in self.root.state_dict().items()}


STATES: dict[str, Callable[[Engine], State]] = {"fsdp2": Fsdp2State, "fsdp1": Fsdp1State}


class ShardedFiles:
    """The part of a checkpoint that is a sharded engine's; all ranks call the same methods.

    Args:
        engine: the engine that the files are of.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.state = STATES[engine.section.strategy](engine)
        self.adapters = has_adapters(engine.model)
        if self.adapters:  # adapters that cannot be merged are refused now, not when the trained model is to be written
            adapted_weights(engine.model, {n for names in engine.sharded.names.values() for n in names})
        world = dist.group.WORLD
        assert world is not None
        limit = world._get_backend(torch.device("cpu")).options._timeout
        self.writing = Background()
        # A group of its own: files are written beside other collectives, and through host memory.
        self.group = dist.new_group(backend="gloo", timeout=limit)

    def save(self, folder: Path, *, background: bool = False) -> None:
        """See `TrainEngine.save`."""
        tensors, steps_done = self.tensors(), self.engine.steps_done
        if background:
            tensors = host_copies(tensors)
        first, beside = self.engine.ranks.rank == 0, {}
        if first and not self.adapters:
            # Read now: a thread must not use a model that computes (FSDP1 takes its parameters away meanwhile).
            beside = files_beside_weights(self.engine.model)
            (folder / "model").mkdir()

        def write() -> None:
            write_shards(tensors, folder, self.group)
            for name, content in beside.items():
                (folder / "model" / name).write_bytes(content)
            if first:
                (folder / PLAIN).write_text(json.dumps({"steps_done": steps_done}))

        if background:
            self.writing.start(write)
        else:
            write()

    def load(self, folder: Path) -> None:
        """See `TrainEngine.load`."""
        weights = self._weights()
        require_kind(folder, adapters=self.adapters)
        if (folder / SHARDS).is_dir():
            moments = read_state(folder / SHARDS, weights, source=folder)
        else:
            self._take_whole(folder, weights)
            moments = read_state(folder, weights, source=folder, weights_too=False)
        self.state.put(weights, moments)
        self.engine.steps_done = json.loads((folder / PLAIN).read_text())["steps_done"]

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        """See `TrainEngine.export`."""
        model = self.engine.model
        stream = self.engine.stream_weights(lora="merged" if self.adapters else None)
        if self.engine.ranks.rank == 0:
            write_streamed(model.get_base_model() if self.adapters else model, stream.tensors, folder, dtype)
        else:
            for _ in stream.tensors:
                pass

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors of a checkpoint, cut over the ranks: "model/NAME" are weights, "exp_avg/NAME" and so on
        moments.
        """
        moments = {f"{kind}/{name}": t for name, kept in self.state.moments().items() for kind, t in kept.items()}
        return {f"model/{name}": t for name, t in self._weights().items()} | moments

    def _weights(self) -> dict[str, Tensor]:
        found = self.state.weights()
        return {n: t for n, t in found.items() if n in self.engine.trained} if self.adapters else found

    def _take_whole(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Takes weights that rank 0 reads, tensor by tensor: no other rank ever holds more than one of them."""
        whole: dict[str, Tensor] = {}
        wrong: list[UserError | None] = [None]
        if self.engine.ranks.rank == 0:
            try:
                whole = read_adapters(weights, folder) if self.adapters else read_model(folder)
                if self.engine.value_head is not None:
                    whole |= {f"value_head.{name}": t for name, t in read_value_tensors(folder).items()}
                aliases = {a for names in self.engine.sharded.names.values() for a in names[1:]}
                own = {name: tuple(t.shape) for name, t in weights.items()}
                saved = {name: tuple(t.shape) for name, t in whole.items() if name not in aliases}
                require_same_shapes(own, saved, source=folder)
            except UserError as error:
                wrong[0] = error
        dist.broadcast_object_list(wrong, 0)
        if wrong[0] is not None:
            raise wrong[0]
        with torch.no_grad():
            for name, piece in weights.items():
                full = from_first(whole.get(name), piece, self.engine.device)
                if isinstance(piece, DTensor):
                    part = distribute_tensor(full, piece.device_mesh, piece.placements, src_data_rank=None)
                    piece.to_local().copy_(part.to_local())
                else:
                    piece.copy_(full)


def _scorer_name(name: str) -> str:
    return name if name.startswith("value_head.") else f"model.{name}"


@contextmanager
def _fsdp1_state(root: torch.nn.Module) -> Iterator[None]:
    """Sets state dicts of the block to this rank's pieces; torch advises against them, and has no others for FSDP1."""
    settings: list[Any] = [StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        with FullyShardedDataParallel.state_dict_type(root, *settings):
            yield
