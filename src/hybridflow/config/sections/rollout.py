"""How answers are generated: the `rollout` section. Importable without torch."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from hybridflow.config.paths import WrittenPath
from hybridflow.config.sections.base import Section


class RolloutSection(Section):
    """How answers are generated."""

    engine: Literal["inline", "vllm", "sglang"] = Field(
        "inline", description="inline: the training process's own model; vllm; sglang."
    )
    mode: Literal["in_process", "workers", "server"] = Field(
        "in_process",
        description="Where vllm or sglang runs. in_process: inside the process of the role rollout; workers: in "
        "processes of its own, one for each place of rollout.tensor_parallel; server: behind HTTP.",
    )
    tensor_parallel: PositiveInt = Field(
        1, description="Processes (devices) that share one copy of the engine's model; must divide its heads."
    )
    replicas: PositiveInt = Field(1, description="Servers that the run starts, in rollout.mode server.")
    servers: list[str] = Field(
        default_factory=list,
        description="Servers that run already, as http://host:port, in rollout.mode server; empty: the run starts its "
        "own.",
    )
    python: WrittenPath | None = Field(
        None,
        description="The Python of the engine's own environment, for servers that the run starts and for sglang; "
        "unset: this one's.",
    )
    start_timeout: PositiveFloat = Field(600, description="Seconds that an engine's processes may take to start.")
    answer_timeout: PositiveFloat = Field(
        600,
        description="Seconds without an answer after which a process with unanswered requests counts as hung.",
    )
    restarts: int = Field(
        3, ge=0, description="How often an engine that died or hung is started again; its requests are sent again."
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
    temperature: float = Field(1.0, gt=0, description="Divides the logits when training samples are drawn.")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample among the fewest tokens whose probabilities add up to this; training computes "
        "probabilities among the same tokens.",
    )
    top_k: int = Field(0, ge=0, description="Sample among so many likeliest tokens; 0: among all.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Sample among tokens at least this share as likely as the likeliest one."
    )
    stop: list[str] = Field(default_factory=list, description="Texts that end an answer; what completes one is kept.")
    stop_regex: str | None = Field(None, description="A regular expression that ends an answer where it matches.")
    max_response_tokens: PositiveInt = Field(1024, description="Longest answer, in tokens (its stop token counts).")
    max_cache_tokens: PositiveInt = Field(
        262_144, description="Bound on the inline engine's key-value cache, in tokens over all running answers."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="What the inline engine multiplies in. auto: bfloat16 on a GPU, the model's own type elsewhere, so "
        "that log-probabilities are those of training; bfloat16 is quicker on CPUs with bf16 dot products.",
    )
    compile: bool = Field(
        False,
        description="Run the inline engine's layers through torch.compile (Llama, Qwen2, Qwen3, "
        "Mistral). It gained nothing on CPUs.",
    )
    lora: Literal["adapters", "merged"] = Field(
        "adapters",
        description="How adapters reach an engine with weights of its own: as adapters, or added into full weights.",
    )
    engine_args: dict[str, int | float | str | bool] = Field(
        default_factory=dict, description="Further arguments of the engine itself (vLLM's LLM)."
    )

    @model_validator(mode="after")
    def _check_sampling(self) -> RolloutSection:
        if self.stop_regex is not None:
            try:
                re.compile(self.stop_regex)
            except re.error as error:
                raise ValueError(
                    f"rollout.stop_regex {self.stop_regex!r} is not a regular expression: {error}"
                ) from error
        if "" in self.stop:
            raise ValueError("rollout.stop holds an empty text, which would end every answer at its first token")
        if self.engine == "vllm" and self.cuts:
            raise ValueError(
                "rollout.engine vllm does not take top_p, top_k and min_p: it does not say which tokens were kept; set "
                "rollout.engine=inline or sglang"
            )
        return self

    @model_validator(mode="after")
    def _check_mode(self) -> RolloutSection:
        plain = type(self).model_construct()
        if self.engine == "inline" and (self.mode != "in_process" or self.tensor_parallel > 1):
            raise ValueError(
                "rollout.mode and rollout.tensor_parallel are of vllm and sglang; the inline engine generates in the "
                "processes of the role rollout: give placement.pools, or set rollout.engine"
            )
        if self.mode != "server":
            own = ("servers", "replicas") if self.engine == "sglang" else ("servers", "replicas", "python")
            for key in own:
                if getattr(self, key) != getattr(plain, key):
                    raise ValueError(f"rollout.{key} is of rollout.mode server: set that, or leave it out")
        if self.engine == "sglang" and self.mode == "workers":
            raise ValueError(
                "rollout.mode workers is of vllm: sglang always computes in processes of its own, so set in_process "
                "or server"
            )
        if self.engine == "vllm" and self.mode == "in_process" and self.tensor_parallel > 1:
            raise ValueError(
                f"rollout.tensor_parallel {self.tensor_parallel} needs processes of the engine's own: set "
                "rollout.mode=workers or server"
            )
        if self.servers and (self.replicas > 1 or self.python is not None):
            raise ValueError(
                "rollout.servers names servers that run already; rollout.replicas and rollout.python are of servers "
                "that the run starts: leave either out"
            )
        for address in self.servers:
            if not re.fullmatch(r"https?://[^/\s:]+(:\d+)?/?", address):
                raise ValueError(f"rollout.servers: {address!r} is no address of a server, such as http://node7:8000")
        return self

    @property
    def cuts(self) -> bool:
        """Whether answers are drawn from a part of the vocabulary."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0
