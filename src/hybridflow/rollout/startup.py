"""What vLLM and SGLang are started with: the model that they compute, and how their processes are looked after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class EngineModel:
    """The model that an engine computes, and what with.

    Args:
        folder: the model in Hugging Face format: its weights are those of version 0; None where servers run already.
        max_model_len: most tokens of a sequence, prompt and response together.
        tensor_parallel: processes that share one copy of the model.
        dtype: what it computes in; by default "float32" on CPUs, "bfloat16" elsewhere.
        seed: seed of the engine's own generators, which requests do not use.
        engine_args: more of the engine's own arguments: of vLLM's `EngineArgs`, such as `max_num_seqs` and
            `kv_cache_memory_bytes`; of SGLang's server arguments, such as `max_running_requests` and
            `mem_fraction_static`.
    """

    folder: str | Path | None
    max_model_len: int
    tensor_parallel: int = 1
    dtype: str | None = None
    seed: int = 0
    engine_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Supervision:
    """How long an engine's processes are waited for, and how often they are started again.

    Args:
        start_timeout: seconds that they may take to start.
        answer_timeout: seconds of silence after which they count as hung, where requests are unanswered.
        restarts: how often each is started again before the run ends.
    """

    start_timeout: float = 600
    answer_timeout: float = 600
    restarts: int = 3


@dataclass(frozen=True, slots=True)
class Launch:
    """Where an engine's processes are started.

    Args:
        python: the interpreter of an environment that has the engine; None is this one.
        run_folder: the run's: they write there what they print, and servers that others may want carry its name. None:
            a new folder for temporary files, and no name.
    """

    python: str | None = None
    run_folder: str | Path | None = None
