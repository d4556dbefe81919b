"""What SGLang must be installed as, and be started with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hybridflow.errors import UserError
from hybridflow.rollout.sglang.sampler import MOST_KEPT
from hybridflow.rollout.sglang.worker import LOADER
from hybridflow.rollout.startup import EngineModel
from hybridflow.sockets import socket_parent

SUPPORTED = (0, 5, 23), (0, 6)  # from, below; the sampler uses internals that may change
INSTALL = (
    "SGLang has an environment of its own: on GPUs `pip install 'sglang>=0.5.23,<0.6'` there (docs/rollout.md), "
    "without one `make install-sglang-cpu`; then set rollout.python to its Python, such as .venv-sglang/bin/python"
)
MARGIN = 8  # tokens that SGLang keeps free of the context it is started with
CPU_CACHE_TOKENS = 16384
CPU_REQUESTS = 64  # at once; more wait in SGLang's queue
OURS: dict[str, Any] = {  # what every engine must be started with
    "custom_weight_loader": [LOADER],
    "sampling_backend": "pytorch",  # the only one that can draw with our noise
    "sampling_mask_max_tokens": MOST_KEPT,
}
SET_BY_US = {*OURS, "model_path", "context_length", "random_seed", "tp_size", "dp_size", "pp_size", "dtype", "device"}


def require_sglang(python: str | None = None) -> str:
    """Returns one line on the SGLang that is installed, for `check`.

    Args:
        python: the interpreter that it runs with; None is this one.

    Raises:
        UserError: it is missing, or of another version.
    """
    version = _version(python or sys.executable)
    if version is None:
        raise UserError(
            f"SGLang is not installed for {python or 'this Python'}", why="rollout.engine is sglang", fix=INSTALL
        )
    check_version(version, "SGLang")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"SGLang {version}, on {device}, in processes of its own"


def check_version(version: str, what: str) -> None:
    """Refuses an SGLang that does not work with this library.

    Raises:
        UserError: it is not in the range.
    """
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
        raise UserError(
            f"{what} {version} is not supported",
            why="older ones have no sessions for weights, and tokens without weight versions; 0.6 was not tried",
            fix=INSTALL,
        )


def arguments(model: EngineModel) -> dict[str, Any]:
    """Returns SGLang's arguments: the usual ones, the user's, and ours, which the user cannot change.

    Raises:
        UserError: an argument that is ours.
    """
    for name in model.engine_args:
        if name in SET_BY_US:
            raise UserError(
                f"the SGLang engine sets {name!r} itself", fix=f"leave {name!r} out of the engine arguments"
            )
    on_cpu = not torch.cuda.is_available()
    usual: dict[str, Any] = {"log_level": "warning", "skip_server_warmup": True, "grammar_backend": "none"}
    if on_cpu:
        usual |= {
            "attention_backend": "torch_native",  # the only one without kernels of SGLang's own
            "disable_overlap_schedule": True,
            "max_total_tokens": max(CPU_CACHE_TOKENS, 2 * model.max_model_len),
            "mem_fraction_static": 0.2,
            "max_running_requests": CPU_REQUESTS,
        }
    else:  # weights and cache are freed while it sleeps, and weights wait in host memory
        usual |= {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
    has_tokenizer = any(
        (Path(str(model.folder)) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    )
    return {
        **usual,
        "skip_tokenizer_init": not has_tokenizer,
        **model.engine_args,
        **OURS,
        "model_path": str(model.folder),
        "context_length": model.max_model_len + MARGIN,
        "random_seed": model.seed,
        "tp_size": model.tensor_parallel,
        "dtype": model.dtype or ("float32" if on_cpu else "bfloat16"),
        "device": "cpu" if on_cpu else "cuda",
    }


def flags(named: Mapping[str, Any]) -> list[str]:
    """Returns arguments as a command line has them; false and None are left out."""
    line: list[str] = []
    for name, value in named.items():
        if value is None or value is False:
            continue
        line.append("--" + name.replace("_", "-"))
        if value is not True:
            line += [str(v) for v in (value if isinstance(value, list) else [value])]
    return line


def environment(tensor_parallel: int) -> dict[str, str]:
    """Returns the environment variables of the processes that run SGLang.

    Args:
        tensor_parallel: how many compute.
    """
    longer = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}  # than the model's: `MARGIN`
    longer["TMPDIR"] = socket_parent()  # its processes talk over sockets there
    if torch.cuda.is_available():
        return longer
    # Its small compiled functions take longer to compile than they ever save on a CPU.
    on_cpu = {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    if tensor_parallel > 1:  # else no more of them may compute than there are memory nodes
        cores = sorted(os.sched_getaffinity(0))
        shares = [",".join(map(str, cores[rank::tensor_parallel] or cores)) for rank in range(tensor_parallel)]
        on_cpu["SGLANG_CPU_OMP_THREADS_BIND"] = os.environ.get("SGLANG_CPU_OMP_THREADS_BIND", "|".join(shares))
    return longer | on_cpu


@cache
def _version(python: str) -> str | None:
    """Returns the version of SGLang that an interpreter has."""
    code = "import importlib.metadata as m\ntry: print(m.version('sglang'))\nexcept m.PackageNotFoundError: pass"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"{python} is no Python that runs: {error}", why="rollout.python names it", fix=INSTALL
        ) from error
    return found.stdout.strip() or None
