"""What the ranks of `tests/engines/test_sharded_files.py` run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybridflow.batch import Batch
from hybridflow.engines.background import Background
from hybridflow.engines.fsdp.engine import ShardedEngine
from hybridflow.engines.local import LocalEngine
from hybridflow.protocols.training import Loss

from on_ranks.engines import Case
from tiny import ragged_batch, weights_of

LOSS = Loss("cross_entropy")
VALUE = Loss("value", {"clip_value": None})


def train_batch() -> Batch:
    """Sequences with all weight columns, the same everywhere."""
    batch = ragged_batch((7, 3, 12, 5, 9, 4, 2, 16))
    batch["policy_weight_T"] = weights_of(batch, "token-mean")
    return batch


def value_batch() -> Batch:
    batch = train_batch()
    batch["value_weight_T"] = batch["policy_weight_T"]
    batch["return_T"] = batch["input_ids_T"].float() / 37
    batch["value_T"] = torch.zeros(batch.total())
    return batch


def step(engine: ShardedEngine | LocalEngine) -> float:
    """An optimizer step on this rank's part of the batch; the loss of all of it."""
    batch, loss = (train_batch(), LOSS) if engine.value_head is None else (value_batch(), VALUE)
    if isinstance(engine, ShardedEngine):
        batch = batch.take(list(range(engine.ranks.place, len(batch), engine.ranks.places)))
    update = engine.update(batch, loss)
    assert update.applied
    return update.metrics["actor/loss"]


def state_of(engine: ShardedEngine | LocalEngine) -> dict[str, Tensor]:
    """All that a checkpoint has, whole."""
    if isinstance(engine, ShardedEngine):
        found = engine.files.tensors()
    else:
        found = {f"model/{name}": t for name, t in engine.weights().items()}
        found |= {f"{kind}/{name}": t for name, kept in engine.moments().items() for kind, t in kept.items()}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in found.items()}


def begin(case: Case, folder: Path) -> dict[str, Tensor]:
    """A fresh engine takes a step and is saved; its state."""
    engine = case.sharded()
    step(engine)
    engine.save(folder)
    return state_of(engine)


def take_over(
    case: Case, source: Path, target: Path, steps: int
) -> tuple[dict[str, Tensor], list[float], dict[str, Tensor]]:
    """Another engine, which has gone elsewhere by itself, loads a checkpoint, saves it again, and trains on.

    Returns its state after loading, the losses of its steps, and its state at the end; of rank 0 alone.
    """
    engine = case.sharded()
    for _ in range(2):
        step(engine)
    engine.load(source)
    loaded = state_of(engine)
    engine.save(target)
    losses = [step(engine) for _ in range(steps)]
    end = state_of(engine)
    return (loaded, losses, end) if dist.get_rank() == 0 else ({}, losses, {})


def load_what_does_not_fit(case: Case, source: Path) -> str:
    """What loading says on this rank."""
    try:
        case.sharded().load(source)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def export(case: Case, folder: Path) -> None:
    engine = case.sharded()
    step(engine)
    engine.export(folder)


def save_where_there_is_no_room(case: Case, folder: Path, background: bool) -> str:
    """What saving says on this rank."""
    try:
        engine = case.sharded()
        engine.save(folder, background=background)
        engine.saved(wait=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def train_while_saving(case: Case, folder: Path) -> dict[str, Tensor]:
    """The state when the engine was saved in the background; it has gone on when the files are there."""
    engine = case.sharded()
    step(engine)
    before = state_of(engine)
    engine.save(folder, background=True)
    step(engine)
    step(engine)
    assert engine.saved(wait=True) and engine.saved(wait=False)
    after = state_of(engine)
    assert any(not t.equal(before[n]) for n, t in after.items())
    return before


class HeldBack(Background):
    """Writes only once `gate` is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def start(self, work: Callable[[], None]) -> None:
        super().start(lambda: self.gate.wait(60) and work())  # type: ignore[func-returns-value]


def save_then_wreck(engine: ShardedEngine | LocalEngine, folder: Path) -> None:
    """Saves in the background, with a writer that comes when nothing of the engine can be read any more."""
    holder = engine.files if isinstance(engine, ShardedEngine) else engine
    writer = holder.writing = HeldBack()
    engine.save(folder, background=True)
    for module in engine.model.modules():
        module._parameters.clear()
        module._buffers.clear()
        for name in ("config", "generation_config", "peft_config"):
            if name in vars(module):
                delattr(module, name)
    if engine.value_head is not None:
        engine.value_head._parameters.clear()
    engine.optimizer.state.clear()
    engine.steps_done = -1
    writer.gate.set()
    assert engine.saved(wait=True)


def save_from_wrecks(case: Case, at_once: Path, beside: Path) -> None:
    engine = case.sharded()
    step(engine)
    engine.save(at_once)
    save_then_wreck(engine, beside)
