"""Generation with vLLM, inside the training process, or with its model in processes of their own.

vLLM's scheduler runs here as a plain object: `wait` steps it in the calling thread, one step after the other, so
nothing is polled and nothing runs in between. The model computes in this process, with one worker and one device, or
in worker processes, each with a part of it (tensor parallelism); the engine keeps its own copy of the weights.

This file handles what vLLM does by default and a trainer must not be exposed to:

- Only the request's stop tokens and stop texts end it: not the model's end-of-sequence token, not
  `generation_config.json`.
- Log-probabilities are of the distribution really sampled (`processed_logprobs`); for greedy requests vLLM divides by
  1 instead of 0, so theirs are the model's own at temperature 1, as `Result` promises, in mixed batches too.
- Results say nothing about which tokens top-p, top-k and min-p kept; training under these is refused
  (`RolloutSection`), evaluation is not.
- Noise has a seed per request. vLLM's generators count on from there, so tokens do not depend on what a request was
  batched with, up to rounding. A continued request gets a seed of its own, from the position it starts at.
- On CPUs prompts are never prefilled in chunks: vLLM would rewind the request's generator after each chunk, and
  torch's CPU generator cannot be rewound ("CPU Generator does not use offset").
- After new weights every cached key and value is dropped, also of requests in flight: they are prefilled again.
- A worker process that ends or hangs takes the whole engine with it. It is started again, given the current weights,
  and requests in flight start over, with the same seed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any, Literal

from hybridflow.config.sections.model import LoraSection
from hybridflow.devices import CPU, count_devices
from hybridflow.errors import UserError
from hybridflow.protocols.generation import Request, Result, Sampling
from hybridflow.protocols.waiting import never
from hybridflow.protocols.weights import Receipt, WeightStream
from hybridflow.rollout.job import Decode, Job, check_request
from hybridflow.rollout.served.model_folder import check_model
from hybridflow.rollout.startup import EngineModel, Supervision
from hybridflow.rollout.stopping import StopText
from hybridflow.rollout.vllm import start as vllm_start
from hybridflow.rollout.vllm.images import image_prompt, image_token
from hybridflow.rollout.vllm.start import process_kept, torch_generators_kept
from hybridflow.rollout.vllm.watch import WorkerWatch
from hybridflow.rollout.vllm.worker import ADAPTER_ID
from hybridflow.weights.adapters import ADAPTER, is_adapter
from hybridflow.weights.channel import Channel, WeightRoute
from hybridflow.weights.readback import together
from hybridflow.weights.stream import WeightSyncError

TEMPERATURES = (0.01, 2.0)  # vLLM silently raises lower ones, and refuses higher ones; 0 is greedy


class VllmEngine:
    """A `RolloutEngine` on vLLM, whose scheduler runs in this process.

    Args:
        model: what it computes. A tokenizer in its folder is needed by models that see images only.
        mode: "in_process": the model computes in this process, which must not run torch.distributed; "workers": in
            processes of its own. Weights then reach them through `weights.channel`, or straight from the processes
            that hold them: see `receivers`.
        lora: the adapter that is trained and published alone: it is swapped in place. None: weights are always whole.
        supervision: when workers count as hung, and how often an engine whose workers are gone is started again.
        route: how `update_weights` reaches workers.
        decode: token ids to text; needed by requests with stop texts only.
        sleep_level: 1: weights wait in host memory while it sleeps; 2: they are dropped, and new ones must be
            published after `wake`. On CPUs vLLM keeps everything.

    Attributes:
        version: version of the weights.
        cache_block: tokens of a block of the prefix cache.
        on_restart: publishes the current weights; called after a restart, before lost requests are sent again. The
            model's folder has not the current ones.
        note: is called with (kind, text) for every event of the engine.

    Raises:
        UserError: vLLM is missing, of another version, or refuses the configuration; no model in the folder, or one
            whose heads `tensor_parallel` does not divide; an adapter that vLLM does not take; or, in process,
            torch.distributed already runs, whose process group vLLM would take over and later destroy.

    In process, torch.distributed is initialised while it lives, with a process group of one; with workers the process
    groups of this process are left alone. The first engine turns torch.compile off for functions compiled after it
    where there is no GPU (TORCHDYNAMO_DISABLE): compiling vLLM's small kernels takes longer than they ever save.
    """

    def __init__(
        self,
        model: EngineModel,
        *,
        mode: Literal["in_process", "workers"] = "in_process",
        lora: LoraSection | None = None,
        supervision: Supervision | None = None,
        route: WeightRoute | None = None,
        decode: Decode | None = None,
        sleep_level: Literal[1, 2] = 1,
    ) -> None:
        self.version = 0
        self.paused = self.asleep = False
        self._interrupted, self._restarting = threading.Event(), False
        self.max_model_len, self.decode = model.max_model_len, decode
        self.should_return: Callable[[], bool] = never
        self.on_restart: Callable[[], object] | None = None
        self.note: Callable[[str, str], None] = lambda kind, text: None
        self._workers, self._sleep_level = mode == "workers", sleep_level
        self._route, self._supervision = route, supervision or Supervision()
        self._restarts_left = self._supervision.restarts
        self._next_handle = 0
        self._jobs: dict[int, Job] = {}
        self._ready: list[Result] = []
        self._channel: Channel | None = None
        self._watch: WorkerWatch | None = None
        self._whole = (
            True  # its weights are usable: not while an update is half done, nor after a sleep that drops them
        )
        assert self._workers or model.tensor_parallel == 1, "tensor parallelism needs workers"
        config = check_model(model)
        self._image_token = image_token(config)
        self._lora = None if lora is None else {"rank": lora.rank, "alpha": lora.alpha}
        if lora is not None and sleep_level == 2:
            raise UserError("adapters alone cannot follow a sleep that drops all weights", fix="sleep at level 1")
        with process_kept():
            self._vllm = vllm = vllm_start.import_vllm()
            on_cpu = bool(vllm.platforms.current_platform.is_cpu())
            self._device = "cpu" if on_cpu else "cuda"
            ours = vllm_start.model_arguments(model, on_cpu=on_cpu) | {
                "distributed_executor_backend": "mp" if self._workers else "uni",
                "skip_tokenizer_init": self._image_token is None,
            }
            if lora is not None:
                ours |= vllm_start.lora_arguments(lora, config)
            self._arguments = vllm_start.engine_arguments(
                ours, model.engine_args, on_cpu=on_cpu, known={f.name for f in fields(vllm.EngineArgs)}
            )
        self._sampling_params = vllm.SamplingParams
        self._deltas = vllm.sampling_params.RequestOutputKind.DELTA
        # vLLM reads an adapter from this path only if it has none of this number: the workers always have.
        self._adapter = vllm.lora.request.LoRARequest(ADAPTER, ADAPTER_ID, "unused") if lora is not None else None
        self._begin()

    replicas = 1
    same_memory = False

    @property
    def cache_block(self) -> int:
        """Tokens of a block of the prefix cache; 0 where there is none."""
        config = self._engine.vllm_config.cache_config
        return int(config.block_size) if config.enable_prefix_caching else 0

    # --- requests ---

    def submit(self, request: Request) -> int:
        """See `RolloutEngine.submit`."""
        check_request(request, decodes=self.decode is not None, max_model_len=self.max_model_len)
        check_temperature(request.sampling)
        self._send(self._next_handle, request)
        self._next_handle += 1
        return self._next_handle - 1

    def _send(self, handle: int, request: Request) -> None:
        """Hands a request to vLLM, from its beginning."""
        sampling = request.sampling
        ids = [*request.prompt_ids, *request.generated_ids]
        prompt: Any = {"type": "token", "prompt_token_ids": ids}
        if request.images:
            prompt = image_prompt(self._engine.renderer, ids, request.images, self._image_token)
        job = Job(handle, request, [(self.version, 0)])
        if sampling.stop or sampling.stop_regex is not None:
            assert self.decode is not None
            job.stop_text = StopText(sampling.stop, sampling.stop_regex, self.decode, request.generated_ids)
        self._engine.add_request(
            str(handle),
            prompt,
            self._sampling_params(
                max_tokens=job.room,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                logit_bias=dict(sampling.logit_bias) or None,
                stop_token_ids=list(sampling.stop_token_ids),
                ignore_eos=True,
                seed=job.seed(),
                logprobs=0,  # of the sampled token only
                detokenize=False,
                output_kind=self._deltas,
            ),
            lora_request=self._adapter,
        )
        self._jobs[handle] = job

    def wait(self) -> list[Result]:
        """See `RolloutEngine.wait`."""
        assert not (self.paused and not self._ready), "waiting for a paused engine would never end"
        assert not (self.asleep and self._jobs), "waiting for a sleeping engine would never end"
        assert self._whole or not self._jobs, "an engine without usable weights: publish some"
        with torch_generators_kept():  # vLLM draws from torch's own generator beside greedy requests
            while not self._ready and self._jobs and not self._interrupting() and not self.should_return():
                self._step()
        if not self._restarting:
            self._interrupted.clear()
        return self.poll()

    def interrupt(self) -> None:
        """See `RolloutEngine.interrupt`; checked before every step of vLLM."""
        self._interrupted.set()

    def _interrupting(self) -> bool:
        return self._interrupted.is_set() and not self._restarting

    def poll(self) -> list[Result]:
        """See `RolloutEngine.poll`."""
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

    def _step(self) -> None:
        """Runs one forward pass for all running requests, after a restart where the workers are gone."""
        if self._watch is None:
            outputs = self._engine.step()
        else:
            try:
                with self._watch.answering():
                    outputs = self._engine.step()
            except Exception as error:  # in any case the workers have not all done the same
                self._start_again(error)
                return
        for output in outputs:
            self._take(output)

    def _take(self, output: Any) -> None:
        """Adds one step's tokens to their job."""
        (new,) = output.outputs
        job = self._jobs.get(int(output.request_id))
        if job is None:
            return  # ended by its text
        reason = None
        for token, logprobs in zip(new.token_ids, new.logprobs, strict=True):
            assert reason is None, "vLLM continued after the end of a request"
            reason = job.take(token, logprobs[token].logprob)
        if reason is not None:
            if not output.finished:
                self._engine.abort_request([output.request_id])
            self._ready.append(self._jobs.pop(job.handle).result(reason))
        else:
            assert not output.finished, f"vLLM ended a request with {new.finish_reason!r}"

    # --- weights and memory ---

    def update_weights(self, stream: WeightStream, version: int) -> list[Receipt]:
        """See `RolloutEngine.update_weights`. What is in flight is prefilled again, under the new weights.

        The engine copies what it takes; the stream's tensors may change afterwards. It must be awake. An exception
        from the stream leaves the engine without usable weights: give it another stream, or close it.

        Raises:
            UserError: the stream carries an adapter, and the engine was started without.
            WeightSyncError: a worker could not take it.
        """
        if self._lora is None and (stream.adapter is not None or any(map(is_adapter, stream.names))):
            raise UserError(
                "the vLLM engine takes full weights, not an adapter alone",
                why="it was started without one",
                fix="start it with lora=, or publish adapters added into the weights: rollout.lora=merged",
            )
        if not self._workers:
            with self._updating(version):
                (taken,) = self._engine.collective_rpc("take_stream", args=(stream, version, self._lora))
                return [Receipt(**taken)]
        if self._channel is None:
            self._channel = Channel(self.receivers(), self._route, device=self._device)
        return self._channel.publish(stream, lambda address: self.receive_weights(address, version))

    def receivers(self) -> list[str]:
        """Returns the host of each process that takes weights, in order of their index."""
        self._begin_if_broken()
        return self._ask("host_name")

    def receive_weights(self, address: str, version: int) -> list[Receipt]:
        """Makes every process take the stream that is sent at an address; returns what each of them received.

        Raises:
            WeightSyncError: one of them did not.
        """
        self._begin_if_broken()
        with self._updating(version):
            return [Receipt(**taken) for taken in self._ask("take_weights", address, 0, version, self._lora)]

    def read_back(self, names: Sequence[str]) -> dict[str, int]:
        """See `RolloutEngine.read_back`.

        Those are left out that it does not hold whole and unpacked: on CPUs most, and with tensor parallelism.
        """
        return together((told["held"] for told in self._ask("read_back", list(names))), "workers of vLLM")

    def forget(self) -> None:
        """See `RolloutEngine.forget`: the prefix cache has memory of its own."""

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`. On CPUs vLLM accepts this and frees nothing."""
        assert not self._jobs, "sleep with requests in flight"
        self._engine.sleep(level=self._sleep_level)
        self._whole = self._whole and self._sleep_level == 1
        self.asleep = True

    def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        self._engine.wake_up()
        self.asleep = False

    def close(self) -> None:
        """See `RolloutEngine.close`. What is in flight is lost; in process, torch.distributed is free again."""
        self._jobs, self._ready = {}, []
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._end()

    @contextmanager
    def _updating(self, version: int) -> Iterator[None]:
        """Holds the engine for an update of weights, then drops what it computed under the old ones."""
        assert not self.asleep, "update_weights on a sleeping engine: wake it first"
        self._whole = False
        yield
        self._engine.reset_prefix_cache(reset_running_requests=True)
        if self._image_token is not None:
            self._engine.reset_mm_cache()
            self._engine.reset_encoder_cache()
        for job in self._jobs.values():
            job.versions.append((version, len(job.tokens)))
        self.version, self._whole = version, True

    # --- workers ---

    def _ask(self, method: str, *args: Any) -> list[Any]:
        """Calls a method of `WeightTaker` on every worker; returns their replies.

        Raises:
            WeightSyncError: one of them failed, or is gone.
        """
        try:
            with self._watch.answering() if self._watch is not None else nullcontext():
                told: list[Any] = self._engine.collective_rpc(method, args=args)
        except Exception as error:
            if self._watch is not None:
                self._watch.kill()  # replies of some workers may still arrive: the next call starts it again
            raise WeightSyncError(f"vLLM's workers ended, or hung, in {method}: {error}") from error
        failed = [f"worker {i}: {t['error']}" for i, t in enumerate(told) if isinstance(t, dict) and "error" in t]
        if failed:
            raise WeightSyncError(f"vLLM failed in {method}: {'; '.join(failed)}")
        return told

    def _begin(self) -> None:
        """Starts vLLM, with the weights of the model's folder."""
        threads = None
        if self._workers and self._device == "cpu":
            threads = max(1, count_devices(CPU) // self._arguments["tensor_parallel_size"])
        with process_kept(threads):
            self._engine = vllm_start.start(
                self._vllm, self._arguments, workers=self._workers, timeout=self._supervision.start_timeout
            )
        if self._workers:
            self._watch = WorkerWatch(
                [w.proc for w in self._engine.model_executor.workers], self._supervision.answer_timeout
            )
        if self._lora is not None:
            self._ask("drop_adapter")

    def _end(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        vllm_start.end(self._engine, workers=self._workers)

    def _begin_anew(self, error: Exception | None) -> list[Job]:
        """Starts an engine again whose workers have ended; returns the jobs that were in flight."""
        assert self._watch is not None
        why = "its worker processes ended" if error is None else f"{type(error).__name__}: {error}"
        if not self._restarts_left:
            raise UserError(
                "vLLM's worker processes ended or hung too often",
                why=f"the last time: {why}",
                fix="read their output; if they ran out of memory, lower max_num_seqs or the cache in "
                "rollout.engine_args; rollout.restarts and rollout.answer_timeout say how often and after how long",
            ) from error
        self._restarts_left -= 1
        lost, self._jobs = list(self._jobs.values()), {}
        self.note("rollout_restart", f"vLLM is started again ({why}); {len(lost)} requests are sent again")
        self._watch.kill()
        self._end()
        self._begin()
        self._whole = self.version == 0
        return lost

    def _begin_if_broken(self) -> None:
        """Starts a broken engine again before it takes new weights."""
        if self._watch is not None and self._watch.broken():
            for job in self._begin_anew(None):
                self._send(job.handle, job.request)

    def _start_again(self, error: Exception) -> None:
        """Starts the engine again as it was before its workers ended: with the current weights, and all requests from
        their beginning.
        """
        lost = self._begin_anew(error)
        if self.on_restart is not None:
            self._restarting = True  # what it generates to verify the weights is not what `interrupt` is about
            try:
                self.on_restart()
            finally:
                self._restarting = False
        if not self._whole:
            raise WeightSyncError(
                "vLLM was restarted with its initial weights, and nothing publishes the current ones"
            ) from error
        for job in lost:
            self._send(job.handle, job.request)


def require_vllm() -> str:
    """Returns one line on the vLLM that is installed, for `check`. Importing it takes seconds.

    Raises:
        UserError: it is missing, or of another version.
    """
    vllm = vllm_start.import_vllm()
    return f"vLLM {vllm.__version__}, on {vllm.platforms.current_platform.get_device_name()}"


def check_temperature(sampling: Sampling) -> None:
    """Refuses a temperature that vLLM would raise in silence, or that it refuses."""
    if sampling.temperature and not TEMPERATURES[0] <= sampling.temperature <= TEMPERATURES[1]:
        raise UserError(
            f"vLLM cannot sample at temperature {sampling.temperature}",
            why=f"it takes 0 (greedy) and {TEMPERATURES[0]} to {TEMPERATURES[1]}",
            fix="change rollout.temperature, or use the inline engine",
        )
