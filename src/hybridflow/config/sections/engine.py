"""The section that describes how a model is sharded over its pool, one kind for each strategy."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from hybridflow.config.sections.base import HERE, Section
from hybridflow.config.sections.choices import OneOf

STRATEGY = "local: one process holds all of the model; fsdp2, fsdp1: every process holds a part of it."
OFFLOAD = (
    "What moves to host memory while this model is idle: parameters, optimizer state or both. fsdp1 "
    "can move the optimizer state alone."
)


class LocalSection(Section):
    """A model that one process holds."""

    strategy: Literal["local"] = Field("local", description=STRATEGY)
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Data type of matrix products; weights stay float32. auto: bfloat16 on a GPU, float32 on a CPU.",
    )

    @property
    def sequence_parallel(self) -> int:
        """Processes that share the tokens of one micro-batch."""
        return 1

    @property
    def offload(self) -> tuple[()]:
        """What moves to host memory between phases."""
        return ()


class _ShardedSection(Section):
    """A model that is sharded: every process holds a part of it."""

    shard_size: PositiveInt | None = Field(
        None,
        description="Number of processes that share one copy of the parameters (HSDP); unset: all processes of the "
        "pool. A smaller number keeps several copies, between which gradients are summed.",
    )
    sequence_parallel: PositiveInt = Field(
        1,
        description="Number of processes that share the tokens of one micro-batch (DeepSpeed-Ulysses), for sequences "
        "whose activations do not fit on one device. It must divide the number of query heads and the "
        "size of the pool.",
    )
    reshard_after_forward: bool = Field(
        True,
        description="Free gathered parameters after the forward pass: less memory, at the cost of gathering them "
        "again for the backward pass.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Data type of matrix products; weights stay float32. auto: bfloat16 on a GPU, float32 on a CPU.",
    )
    reduce_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Data type in which gradients are summed between processes."
    )
    sync_every_microbatch: bool = Field(
        False,
        description="true: sum gradients between processes after every micro-batch, so that each process keeps only "
        "its shard of them: less memory, more communication. false: sum them once per update; every "
        "process keeps whole gradients until then.",
    )
    cpu_offload: bool = Field(
        False,
        description="Keep parameters, gradients and optimizer state in host memory, and copy each layer to the device "
        "while it computes.",
    )
    activation_offload: bool = Field(
        False, description="Keep saved activations in host memory until the backward pass."
    )


class Fsdp2Section(_ShardedSection):
    """A model that FSDP2 shards."""

    strategy: Literal["fsdp2"] = Field(description=STRATEGY)
    offload: list[Literal["parameters", "optimizer"]] = Field(default_factory=list, description=OFFLOAD)
    compile: bool = Field(
        False, description="Compile every layer with torch.compile: slow to start, and meant for GPUs."
    )

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.cpu_offload and "parameters" in self.offload:
            raise ValueError(f"{HERE}.cpu_offload keeps parameters in host memory already: leave {HERE}.offload out")
        return self


class Fsdp1Section(_ShardedSection):
    """A model that FSDP1 shards; it cannot move its flat tensors to host memory, nor compile layers."""

    strategy: Literal["fsdp1"] = Field(description=STRATEGY)
    offload: list[Literal["optimizer"]] = Field(default_factory=list, description=OFFLOAD)

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.cpu_offload and self.sync_every_microbatch:
            raise ValueError(
                f"{HERE}.sync_every_microbatch: FSDP1 loses gradients when they are summed into host memory twice; set "
                f"{HERE}.strategy=fsdp2, or leave it or {HERE}.cpu_offload out"
            )
        return self


ShardedSection = Fsdp2Section | Fsdp1Section
EngineSection = Annotated[
    LocalSection | Fsdp2Section | Fsdp1Section,
    OneOf(
        "strategy",
        what="How the processes of its pool compute a model: what is sharded, and in which precision.",
    ),
]
