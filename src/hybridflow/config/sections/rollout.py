"""How responses are generated: the `rollout` section, of each engine and mode its own. Importable without torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from hybridflow.config.paths import WrittenPath
from hybridflow.config.sections.base import Section
from hybridflow.config.sections.choices import OneOf

ENGINE = "Engine that generates. inline: the training process's own model; vllm; sglang."
MODE = (
    "Where vllm or sglang runs. in_process: in the process of the role rollout; workers: in "
    "rollout.tensor_parallel worker processes; server: in an HTTP server."
)


class GenerationSection(Section):
    """How responses are generated, by any engine."""

    temperature: float = Field(1.0, gt=0, description="Sampling temperature in training.")
    stop: list[str] = Field(
        default_factory=list, description="Texts that end a response. The response keeps the text that ended it."
    )
    stop_regex: str | None = Field(None, description="A regular expression that ends a response where it matches.")
    max_response_tokens: PositiveInt = Field(1024, description="Longest response, in tokens; its stop token counts.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Data type of the inline engine's matrix products. auto: bfloat16 on a GPU, the model's own type "
        "elsewhere, so that log-probabilities equal those of training; bfloat16 is faster on CPUs with "
        "bf16 dot products.",
    )
    lora: Literal["adapters", "merged"] = Field(
        "adapters",
        description="How LoRA adapters reach an engine with weights of its own. adapters: as adapters; merged: added "
        "into full weights.",
    )
    read_back_every: int = Field(
        10,
        ge=0,
        description="Weight updates between two read-backs: weights are read from engines that expose them, and "
        "compared with those sent; 0: never. Fingerprints of what arrives, and the log-probabilities of a test "
        "sequence, are always compared.",
    )
    sleep: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether the engine frees its memory while models are trained. auto: on a GPU, if vllm or sglang "
        "shares the process or the pool of a model. Servers have devices of their own, and do not sleep.",
    )

    @model_validator(mode="after")
    def _check_stops(self) -> Self:
        if self.stop_regex is not None:
            try:
                re.compile(self.stop_regex)
            except re.error as error:
                raise ValueError(
                    f"rollout.stop_regex {self.stop_regex!r} is not a regular expression: {error}"
                ) from error
        if "" in self.stop:
            raise ValueError("rollout.stop holds an empty text, which would end every response at its first token")
        return self

    @property
    def cut(self) -> dict[str, Any]:
        """The part of the vocabulary that responses are drawn from, as `Sampling` has it; empty: all of it."""
        return {}


class _CutSection(GenerationSection):
    """An engine that can sample from a part of the vocabulary and reports which tokens were in it."""

    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample among the fewest likeliest tokens whose probabilities add up to this (nucleus sampling). "
        "Training computes probabilities over the same tokens; vllm does not report them, and so has no "
        "such key.",
    )
    top_k: int = Field(0, ge=0, description="Sample among this many likeliest tokens; 0: among all.")
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Sample among the tokens whose probability is at least this share of the likeliest token's.",
    )

    @property
    def cut(self) -> dict[str, Any]:
        """See `GenerationSection.cut`."""
        given = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        return given if self.top_p < 1 or self.top_k > 0 or self.min_p > 0 else {}


class InlineSection(_CutSection):
    """Generation by the training process's own model, or by replicas of it in the processes of a pool."""

    engine: Literal["inline"] = Field("inline", description=ENGINE)
    max_cache_tokens: PositiveInt = Field(
        262_144, description="Size of the inline engine's key-value cache, in tokens over all running responses."
    )
    compile: bool = Field(
        False,
        description="Compile the inline engine's layers with torch.compile (Llama, Qwen2, Qwen3, Mistral). It is no "
        "faster on CPUs.",
    )


class OwnEngineSection(GenerationSection):
    """An engine with weights, and mostly processes, of its own."""

    start_timeout: PositiveFloat = Field(600, description="Seconds that an engine's processes may take to start.")
    answer_timeout: PositiveFloat = Field(
        600,
        description="Seconds of silence after which an engine process with requests in flight counts as hung.",
    )
    restarts: int = Field(
        3,
        ge=0,
        description="How often an engine that died or hung is started again. Its requests in flight are sent again.",
    )
    engine_args: dict[str, int | float | str | bool] = Field(
        default_factory=dict,
        description="Further arguments of the engine itself, by the engine's own names (for vLLM, those of its class "
        "LLM).",
    )


class _SharedSection(OwnEngineSection):
    """An engine that can shard its model over devices."""

    tensor_parallel: PositiveInt = Field(
        1,
        description="Number of processes (devices) that share one copy of the engine's model; it must divide the "
        "number of heads.",
    )


class _PythonSection(_SharedSection):
    """An engine that may live in an environment of its own."""

    python: WrittenPath | None = Field(
        None,
        description="Python interpreter of the engine's own environment, for servers that the run starts and for "
        "sglang; unset: this interpreter.",
    )


class _ServerSection(_PythonSection):
    """An engine behind HTTP."""

    mode: Literal["server"] = Field(description=MODE)
    replicas: PositiveInt = Field(1, description="Number of servers that the run starts.")
    servers: list[str] = Field(
        default_factory=list,
        description="Addresses of running servers, as http://host:port; empty: the run starts its own.",
    )

    @field_validator("servers")
    @classmethod
    def _check_addresses(cls, servers: list[str]) -> list[str]:
        for address in servers:
            if not re.fullmatch(r"https?://[^/\s:]+(:\d+)?/?", address):
                raise ValueError(f"{address!r} is no address of a server, such as http://node7:8000")
        return servers

    @model_validator(mode="after")
    def _check_servers(self) -> Self:
        if self.servers and (self.replicas > 1 or self.python is not None):
            raise ValueError(
                "rollout.servers names servers that run already; rollout.replicas and rollout.python are of servers "
                "that the run starts: leave either out"
            )
        return self


class VllmInProcessSection(OwnEngineSection):
    """vLLM inside the process of the role rollout."""

    engine: Literal["vllm"] = Field(description=ENGINE)
    mode: Literal["in_process"] = Field("in_process", description=MODE)


class VllmWorkersSection(_SharedSection):
    """vLLM in processes of its own."""

    engine: Literal["vllm"] = Field(description=ENGINE)
    mode: Literal["workers"] = Field(description=MODE)


class VllmServerSection(_ServerSection):
    """vLLM behind HTTP."""

    engine: Literal["vllm"] = Field(description=ENGINE)


class SglangInProcessSection(_PythonSection, _CutSection):
    """SGLang beside the process of the role rollout; it always computes in processes of its own."""

    engine: Literal["sglang"] = Field(description=ENGINE)
    mode: Literal["in_process"] = Field("in_process", description=MODE)


class SglangServerSection(_ServerSection, _CutSection):
    """SGLang behind HTTP."""

    engine: Literal["sglang"] = Field(description=ENGINE)


OwnEngine = VllmInProcessSection | VllmWorkersSection | VllmServerSection | SglangInProcessSection | SglangServerSection
RolloutSection = Annotated[
    InlineSection
    | VllmInProcessSection
    | VllmWorkersSection
    | VllmServerSection
    | SglangInProcessSection
    | SglangServerSection,
    OneOf("engine", "mode", what="How responses are generated."),
]
