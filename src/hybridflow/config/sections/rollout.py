"""How responses are generated: the `rollout` section, of each engine and mode its own. Importable without torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from hybridflow.config.paths import WrittenPath
from hybridflow.config.sections.base import Section
from hybridflow.config.sections.choices import OneOf

ENGINE = "inline: the training process's own model; vllm; sglang."
MODE = (
    "Where vllm or sglang runs. in_process: inside the process of the role rollout; workers: in processes of its own, "
    "one for each place of rollout.tensor_parallel; server: behind HTTP."
)


class GenerationSection(Section):
    """How responses are generated, whatever generates them."""

    temperature: float = Field(1.0, gt=0, description="Divides the logits when training samples are drawn.")
    stop: list[str] = Field(default_factory=list, description="Texts that end an answer; what completes one is kept.")
    stop_regex: str | None = Field(None, description="A regular expression that ends an answer where it matches.")
    max_response_tokens: PositiveInt = Field(1024, description="Longest answer, in tokens (its stop token counts).")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="What the inline engine multiplies in. auto: bfloat16 on a GPU, the model's own type elsewhere, so "
        "that log-probabilities are those of training; bfloat16 is quicker on CPUs with bf16 dot products.",
    )
    lora: Literal["adapters", "merged"] = Field(
        "adapters",
        description="How adapters reach an engine with weights of its own: as adapters, or added into full weights.",
    )
    read_back_every: int = Field(
        10,
        ge=0,
        description="Every so many publications, read weights back out of engines that expose them, and compare; 0: "
        "never. Fingerprints of what arrives, and a canary, are always compared.",
    )
    sleep: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether the engine gives its memory back while models are trained. auto: on a GPU, where vllm or "
        "sglang is in the process or the pool of a model; servers have devices of their own.",
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
            raise ValueError("rollout.stop holds an empty text, which would end every answer at its first token")
        return self

    @property
    def cut(self) -> dict[str, Any]:
        """The part of the vocabulary that responses are drawn from, as `Sampling` has it; empty: all of it."""
        return {}


class _CutSection(GenerationSection):
    """An engine that can draw from a part of the vocabulary and says which tokens were in it; vLLM does not say."""

    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample among the fewest tokens whose probabilities add up to this; training computes "
        "probabilities among the same tokens, which vllm does not name.",
    )
    top_k: int = Field(0, ge=0, description="Sample among so many likeliest tokens; 0: among all.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Sample among tokens at least this share as likely as the likeliest one."
    )

    @property
    def cut(self) -> dict[str, Any]:
        """See `GenerationSection.cut`."""
        given = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        return given if self.top_p < 1 or self.top_k > 0 or self.min_p > 0 else {}


class InlineSection(_CutSection):
    """The training process's own model answers, or replicas of it in the processes of a pool."""

    engine: Literal["inline"] = Field("inline", description=ENGINE)
    max_cache_tokens: PositiveInt = Field(
        262_144, description="Bound on the inline engine's key-value cache, in tokens over all running answers."
    )
    compile: bool = Field(
        False,
        description="Run the inline engine's layers through torch.compile (Llama, Qwen2, Qwen3, "
        "Mistral). It gained nothing on CPUs.",
    )


class OwnEngineSection(GenerationSection):
    """An engine with weights, and mostly processes, of its own."""

    start_timeout: PositiveFloat = Field(600, description="Seconds that an engine's processes may take to start.")
    answer_timeout: PositiveFloat = Field(
        600,
        description="Seconds without an answer after which a process with unanswered requests counts as hung.",
    )
    restarts: int = Field(
        3, ge=0, description="How often an engine that died or hung is started again; its requests are sent again."
    )
    engine_args: dict[str, int | float | str | bool] = Field(
        default_factory=dict, description="Further arguments of the engine itself (vLLM's LLM)."
    )


class _SharedSection(OwnEngineSection):
    """An engine that can share its model among devices."""

    tensor_parallel: PositiveInt = Field(
        1, description="Processes (devices) that share one copy of the engine's model; must divide its heads."
    )


class _PythonSection(_SharedSection):
    """An engine that may live in an environment of its own."""

    python: WrittenPath | None = Field(
        None,
        description="The Python of the engine's own environment, for servers that the run starts and for sglang; "
        "unset: this one's.",
    )


class _ServerSection(_PythonSection):
    """An engine behind HTTP."""

    mode: Literal["server"] = Field(description=MODE)
    replicas: PositiveInt = Field(1, description="Servers that the run starts.")
    servers: list[str] = Field(
        default_factory=list,
        description="Servers that run already, as http://host:port; empty: the run starts its own.",
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
    OneOf("engine", "mode", what="How answers are generated."),
]
