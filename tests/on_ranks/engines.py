"""What the ranks of tests/engines/test_fsdp.py run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.config.sections.engine import EngineSection, ShardedSection
from hybridflow.config.sections.model import LoraSection, ModelSection
from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.fsdp import activations
from hybridflow.engines.fsdp.engine import ShardedEngine, ShardedReference
from hybridflow.engines.fsdp.fsdp1 import Fsdp1
from hybridflow.engines.fsdp.load import load_sharded
from hybridflow.engines.local import LocalEngine
from hybridflow.engines.passes import microbatches
from hybridflow.errors import UserError
from hybridflow.models.checkpointing import checkpoint_activations
from hybridflow.models.load import stop_ids
from hybridflow.models.lora import add_lora
from hybridflow.models.value import ValueHead, value_head
from hybridflow.protocols.training import Loss, Update
from linear import linear_model

from tiny import packed_model, plain_model

# AdamW divides by the root of tiny second moments: this eps keeps the rounding of a processor from being blown up.
OPTIM = {"lr": 1e-3, "clip_grad_norm": 0.05, "weight_decay": 0.1, "eps": 1e-6}


@dataclass(frozen=True)
class Case:
    """A model, and how it is trained."""

    kind: str = "qwen3"
    section: dict[str, Any] = field(default_factory=dict)  # of the engine; nothing is the local one
    lora: bool = False
    padded: bool = False
    checkpointing: bool = False
    head: bool = False
    double: bool = False
    cut: int = 20
    optim: dict[str, Any] = field(default_factory=lambda: dict(OPTIM))

    def model(self) -> PreTrainedModel:
        """The same on every rank and in the test's own process."""
        if self.kind == "linear":
            return linear_model()
        dtype = torch.float64 if self.double else torch.float32
        model = plain_model(self.kind).to(dtype) if self.padded else packed_model(self.kind, dtype=dtype)
        if self.checkpointing:
            checkpoint_activations(model)
        return add_lora(model, LoraSection(rank=4), seed=0) if self.lora else model

    def value_head(self, model: PreTrainedModel) -> ValueHead | None:
        """One that is not zero, so that the trunk has a gradient from it."""
        if not self.head:
            return None
        head = value_head(model).to(torch.promote_types(torch.float32, model.dtype))
        with torch.no_grad():
            head.weight.copy_(torch.linspace(-1, 1, len(head.weight)))
        return head

    def local(self) -> LocalEngine:
        model = self.model()
        head, optim = self.value_head(model), OptimSection(**self.optim)
        return LocalEngine(model, optim, total_steps=10, tokens_per_microbatch=1000, value_head=head)

    def sharded(self) -> ShardedEngine:
        model = self.model()
        return ShardedEngine(
            model,
            OptimSection(**self.optim),
            section=section_of(self.section),
            total_steps=10,
            tokens_per_microbatch=self.cut,
            value_head=self.value_head(model),
        )


def section_of(keys: dict[str, Any]) -> ShardedSection:
    section: ShardedSection = TypeAdapter(EngineSection).validate_python(keys)
    return section


@dataclass
class Trained:
    """What some steps on the same sequences did: the first's gradient, weights before and after, scores at the end."""

    updates: list[Update]
    gradients: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    scores: dict[str, Tensor]


def train(case: Case, parts: Sequence[Batch], loss: Loss, steps: int = 3, moved: bool = False) -> Trained:
    """Runs on every rank, each with the part of its place."""
    engine = case.sharded()
    part, before, updates, gradients = parts[engine.ranks.place], whole_weights(engine), [], {}
    for step in range(steps):
        updates.append(engine.update(part, loss, rows=[len(p) for p in parts]))
        if not step:
            gradients = whole_gradients(engine)
        if moved:
            engine.to("host")
            engine.to("device")
    scores = engine.score(part, outputs_of(case), temperature=0.7)
    return Trained(updates, gradients, before, whole_weights(engine), scores)


def outputs_of(case: Case) -> list[str]:
    return ["logp", "entropy"] + ["value"] * case.head


def whole_gradients(engine: ShardedEngine) -> dict[str, Tensor]:
    """Full gradients by parameter name; all ranks call this."""
    sharding = engine.sharded.sharding
    if isinstance(sharding, Fsdp1):
        found = ((n.removeprefix("model."), t) for n, t in sharding.full_tensors(gradients=True))
        return {
            n: t for n, t in found if n in engine.trained
        }  # the flat tensor's gradient is zero at frozen parameters
    return {n: p.grad.full_tensor() for n, p in engine.trained.items() if p.grad is not None}  # type: ignore[attr-defined]


def whole_weights(engine: ShardedEngine) -> dict[str, Tensor]:
    """Full weights by parameter name; all ranks call this."""
    return {name: tensor.detach().clone() for name, tensor in engine.sharded.full_tensors()}


def reference_of_adapters(case: Case, parts: Sequence[Batch], loss: Loss) -> list[dict[str, Tensor]]:
    """Scores of a fresh actor, then after a step those without its adapters, its own, and those of a frozen model."""
    engine = case.sharded()
    part = parts[engine.ranks.place]

    def reference() -> dict[str, Tensor]:
        with engine.model.disable_adapter():
            return engine.score(part, ["logp"])

    found = [reference()]  # before anything was trained
    assert engine.update(part, loss).applied
    frozen = ShardedReference(Case(case.kind).model(), section=section_of(case.section), tokens_per_microbatch=case.cut)
    found += [reference(), engine.score(part, ["logp"]), frozen.score(part, ["logp"])]
    before = whole_weights(engine)
    assert engine.update(part, loss).applied
    changed = {name for name, tensor in whole_weights(engine).items() if not torch.equal(tensor, before[name])}
    assert changed == set(engine.trained), "adapters alone are trained, after they had been off too"
    return found


def offloading(case: Case, parts: Sequence[Batch], loss: Loss) -> Trained:
    """`train` with every saved activation moved, however small it is."""
    usual, activations.SMALL = activations.SMALL, 0
    try:
        return train(case, parts, loss)
    finally:
        activations.SMALL = usual


def published(case: Case) -> tuple[list[str], dict[str, Tensor]]:
    """The names that a stream says it holds, and what it then holds."""
    stream = case.sharded().stream_weights()
    return sorted(stream.names), {name: tensor.clone() for name, tensor in stream.tensors}


def loaded(section: dict[str, Any], model: dict[str, Any], batch: Batch) -> tuple[int, dict[str, Tensor], Any]:
    """From a folder: bytes that this rank was given, scores of the whole batch, and ids that end an answer."""
    made, tokenizer = load_sharded(ModelSection(**model), seed=0)
    held = sum(p.nbytes for p in made.parameters() if not p.is_meta)
    engine = ShardedEngine(made, OptimSection(), section=section_of(section), total_steps=1, tokens_per_microbatch=99)
    return held, engine.score(batch, ["logp"]), stop_ids(made, tokenizer)


def refused(case: Case, parts: Sequence[Batch], loss: Loss, rows: Sequence[int]) -> str:
    """What an update says that is told other numbers of sequences than it was given."""
    engine = case.sharded()
    before = whole_weights(engine)
    try:
        engine.update(parts[engine.ranks.place], loss, rows=rows)
    except RuntimeError as error:
        assert all(torch.equal(t, before[n]) for n, t in whole_weights(engine).items())
        return str(error)
    return ""


def not_made(case: Case) -> str:
    """Why an engine cannot be made."""
    try:
        case.sharded()
    except (UserError, RuntimeError) as error:
        return str(error)
    return ""


def spoilt(case: Case, parts: Sequence[Batch], bad: Sequence[Batch], loss: Loss) -> list[Update]:
    """A good update, a bad one, which must leave everything as it is, and a good one."""
    engine = case.sharded()
    place = engine.ranks.place
    updates = [engine.update(parts[place], loss)]
    before, moments = whole_weights(engine), copy.deepcopy(engine.moments())
    updates.append(engine.update(bad[place], loss))
    assert engine.steps_done == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole_weights(engine).items())
    for name, kept in engine.moments().items():
        assert all(torch.equal(local(value), local(moments[name][kind])) for kind, value in kept.items()), name
    return [*updates, engine.update(parts[place], loss)]


def local(tensor: Tensor) -> Tensor:
    """This rank's piece."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sums_between_ranks(case: Case, parts: Sequence[Batch], loss: Loss) -> tuple[int, int]:
    """How many micro-batches an update made, and how many times gradients were summed between ranks for it."""
    engine = case.sharded()
    passes = engine.ranks.largest(len(microbatches(parts[engine.ranks.place], case.cut)))
    with Sums() as sums:
        engine.update(parts[engine.ranks.place], loss)
    return passes, sums.count


class Sums(TorchDispatchMode):
    """Counts the sums between ranks that leave each rank its piece."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func).startswith("c10d._reduce_scatter")
        return func(*args, **(kwargs or {}))


def scored_around_a_change(case: Case, parts: Sequence[Batch]) -> list[Tensor]:
    """Scores of these weights, and of their halves: what a checkpoint does that is read after a score."""
    engine = case.sharded()
    part = parts[engine.ranks.place]
    before = engine.score(part, ["logp"])["logp"]
    with torch.no_grad():
        for parameter in engine.trained.values():
            local(parameter).mul_(0.5)
    return [before, engine.score(part, ["logp"])["logp"]]


def drilled(case: Case, whole: Batch) -> None:
    """Every shard changes and changes back; between, scores and what is published are of the changed weights."""
    engine = case.sharded()
    engine.update(whole, Loss("cross_entropy"), rows=[len(whole)] * dist.get_world_size())
    part = whole.take([0, 2])
    before, score = {n: local(t).clone() for n, t in engine.published().items()}, engine.score(part, ["logp"])["logp"]
    engine.perturb()
    for name, tensor in engine.published().items():
        assert not (local(tensor) == before[name]).any(), name
    published = {n: t.clone() for n, t in engine.stream_weights().tensors}
    single = LocalEngine(packed_model(case.kind), OptimSection(), total_steps=1, tokens_per_microbatch=1000)
    single.model.load_state_dict(published)
    changed = engine.score(part, ["logp"])["logp"]
    off = 0.2 if case.section["dtype"] == "bfloat16" else 1e-4
    assert (changed - single.score(part, ["logp"])["logp"]).abs().max() < off < (changed - score).abs().max()
    engine.perturb()
    assert all(torch.equal(local(t), before[n]) for n, t in engine.published().items())
    assert torch.equal(engine.score(part, ["logp"])["logp"], score)


def precisions(case: Case, parts: Sequence[Batch], loss: Loss) -> set[torch.dtype]:
    """What weights, moments and gradients are kept in."""
    engine = case.sharded()
    engine.update(parts[engine.ranks.place], loss)
    kept = [*engine.trained.values(), *(p.grad for p in engine.trained.values() if p.grad is not None)]
    kept += [moment for moments in engine.moments().values() for moment in moments.values()]
    return {tensor.dtype for tensor in kept}


def another_model_on_rank_1() -> str:
    return not_made(Case("qwen3" if dist.get_rank() == 0 else "llama", {"strategy": "fsdp2"}))


# --- one engine that stays, for `simulated_ranks.RealRanks` ---

_engines: dict[Any, ShardedEngine] = {}


def make(key: Any, case: Case) -> None:
    _engines[key] = case.sharded()


def score(key: Any, parts: Sequence[Batch], outputs: Sequence[str], temperature: float) -> dict[str, Tensor]:
    engine = _engines[key]
    return engine.score(parts[engine.ranks.place], outputs, temperature=temperature)


def update(key: Any, parts: Sequence[Batch], loss: Loss) -> tuple[Update, dict[str, Tensor]]:
    engine = _engines[key]
    update = engine.update(parts[engine.ranks.place], loss, rows=[len(part) for part in parts])
    return update, whole_gradients(engine)
