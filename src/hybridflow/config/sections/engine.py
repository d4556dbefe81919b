"""The section that says how a model is cut over its pool."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from hybridflow.config.sections.base import HERE, Section


class EngineSection(Section):
    """How a model is computed by the processes of its pool: what is sharded, and in which precision."""

    strategy: Literal["local", "fsdp2", "fsdp1"] = Field(
        "local",
        description="local: one process holds all of the model; fsdp2, fsdp1: every process holds a part of it.",
    )
    shard_size: PositiveInt | None = Field(
        None,
        description="Processes that share one copy of the parameters (HSDP); unset: all of the pool. Fewer keep "
        "several copies, and gradients are summed between them.",
    )
    sequence_parallel: PositiveInt = Field(
        1,
        description="Processes that share the tokens of one micro-batch (DeepSpeed-Ulysses): for sequences whose "
        "activations do not fit one device. Must divide the query heads and the pool.",
    )
    reshard_after_forward: bool = Field(
        True, description="Give gathered parameters back after the forward pass: less memory, one more gathering."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="What is multiplied in; weights stay float32. auto: bfloat16 on a GPU, float32 on a CPU."
    )
    reduce_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="What gradients are summed in between processes."
    )
    sync_every_microbatch: bool = Field(
        False,
        description="Sum gradients between processes after every micro-batch, so that each keeps its part of them "
        "alone: less memory, one more exchange for each. Otherwise they are summed once for an update, and every "
        "process keeps whole gradients until then.",
    )
    cpu_offload: bool = Field(
        False, description="Keep parameters, gradients and optimizer state in host memory; layers visit the device."
    )
    offload: list[Literal["parameters", "optimizer"]] = Field(
        default_factory=list, description="What moves to host memory between the phases in which this model works."
    )
    activation_offload: bool = Field(
        False, description="Keep saved activations in host memory until the backward pass."
    )
    compile: bool = Field(False, description="torch.compile of every layer: slow to start, and meant for GPUs.")

    @model_validator(mode="after")
    def _check_strategy(self) -> EngineSection:
        if self.strategy == "local":
            plain = EngineSection.model_construct()
            for key in type(self).model_fields:
                if key != "dtype" and getattr(self, key) != getattr(plain, key):
                    raise ValueError(f"{HERE}.{key} is for sharded models: set {HERE}.strategy=fsdp2 or leave it out")
        if self.cpu_offload and "parameters" in self.offload:
            raise ValueError(f"{HERE}.cpu_offload keeps parameters in host memory already: leave {HERE}.offload out")
        return self
