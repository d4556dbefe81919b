"""Generation with vLLM's HTTP server.

Tokens go in and come out (``/inference/v1/generate``); weights reach the server's workers past HTTP, through
`vllm/worker.py`, which its methods for development call. What `vllm/engine.py` says about vLLM holds here too: the same
stop tokens, seeds, log-probabilities, and caches dropped with new weights. Requests freeze while weights are exchanged
and continue with the new ones; the server reports which token was sampled under which weight version.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hybridflow.config.sections.model import LoraSection
from hybridflow.errors import UserError
from hybridflow.protocols.generation import Request
from hybridflow.protocols.weights import Receipt
from hybridflow.rollout.job import Decode, Job
from hybridflow.rollout.served.http import FREE, Refused, ServerEngine
from hybridflow.rollout.served.model_folder import check_model
from hybridflow.rollout.served.replica import Piece, Replica
from hybridflow.rollout.startup import EngineModel, Launch, Supervision
from hybridflow.rollout.vllm.engine import check_temperature
from hybridflow.rollout.vllm.images import image_token
from hybridflow.rollout.vllm.start import FIXED, INSTALL, SUPPORTED, engine_arguments, lora_arguments, model_arguments
from hybridflow.sockets import socket_parent
from hybridflow.weights.adapters import ADAPTER
from hybridflow.weights.channel import WeightRoute
from hybridflow.weights.readback import together
from hybridflow.weights.stream import WeightSyncError

IMPOSSIBLE = -9999.0  # what the server sends for log-probabilities that JSON cannot hold
GPU_CACHE_BLOCK = 16
OURS = FIXED | {"enable_scale_out": True}  # what every server must be started with: the requests of this engine


class VllmServerEngine(ServerEngine):
    """A `RolloutEngine` on one or several vLLM servers.

    Args:
        model: what servers compute. Of servers that run already `max_model_len` alone is read.
        servers: addresses of servers that run already, as ``http://host:port``; see docs/rollout.md.
        replicas: how many servers to start, where none is given.
        lora: the adapter that is trained and published alone: it is swapped in place. None: weights are always whole.
        launch: where these are started: an environment with vLLM. Other runs see its folder as the owner of a server.
        supervision: when a server counts as hung, and how often each is started again.
        route: how weights travel.
        decode: token ids to text; needed by requests with stop texts only.

    Raises:
        UserError: vLLM is missing, of another version, or refuses the configuration; a server does not answer, was
            started with other arguments than it must have, or samples for another run.
    """

    def __init__(
        self,
        model: EngineModel,
        *,
        servers: Sequence[str] = (),
        replicas: int = 1,
        lora: LoraSection | None = None,
        launch: Launch | None = None,
        supervision: Supervision | None = None,
        route: WeightRoute | None = None,
        decode: Decode | None = None,
    ) -> None:
        launch = launch or Launch()
        on_cpu = not torch.cuda.is_available()
        self._image_token: int | None = None
        self._lora = None if lora is None else {"rank": lora.rank, "alpha": lora.alpha}
        self._ids: dict[int, str] = {}  # of the requests in flight, by handle
        if not servers:
            config = check_model(model)
            self._image_token = image_token(config)
            require_vllm_at(launch.python or sys.executable)
            ours = model_arguments(model, on_cpu=on_cpu) | {
                "enable_scale_out": True,
                "skip_tokenizer_init": self._image_token is None,
            }
            if on_cpu:
                ours["distributed_executor_backend"] = "uni" if model.tensor_parallel == 1 else "mp"
            if lora is not None:
                ours |= lora_arguments(lora, config)
            self._arguments = engine_arguments(ours, model.engine_args, on_cpu=on_cpu)
        self.cache_block = 0 if servers else int(self._arguments.get("block_size", GPU_CACHE_BLOCK))
        super().__init__(
            servers=servers,
            replicas=replicas,
            max_model_len=model.max_model_len,
            launch=launch,
            supervision=supervision,
            route=route,
            decode=decode,
        )
        self.open()

    def read_back(self, names: Sequence[str]) -> dict[str, int]:
        """See `RolloutEngine.read_back`: what some worker holds whole, unpacked and in the precision it arrived in."""
        answers = [a for of_one in self._do(self._from_all("read_back", [list(names)])) for a in of_one]
        for answer in answers:
            if "error" in answer:
                raise WeightSyncError(f"a vLLM worker cannot read its weights back: {answer['error']}")
        return together((answer["held"] for answer in answers), "processes of the vLLM servers")

    # --- starting ---

    def _command(self, port: int) -> list[str]:
        flags = {"host": "127.0.0.1", "port": port, "disable_uvicorn_access_log": True, **self._arguments}
        return [self.python, "-m", "vllm.entrypoints.openai.api_server", *_flags(flags)]

    def _environment(self) -> dict[str, str]:
        wanted = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
        wanted["VLLM_RPC_BASE_PATH"] = os.environ.get("VLLM_RPC_BASE_PATH") or socket_parent()
        if self._lora is not None:
            wanted["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if not torch.cuda.is_available():
            wanted |= {
                "TORCHDYNAMO_DISABLE": "1",  # compiling its small kernels takes longer than they ever save
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model in the process of the scheduler, where it is whole
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or it occupies cores that training and other engines run on
            }
        return wanted

    async def _settle(self, replica: Replica) -> None:
        if not self.managed:
            await self._check_server(replica)
        mark = (await self._call(replica, "/weight_info", method="GET"))["weight_version"]
        self._claim(replica, mark)
        await self._call(replica, "/update_weight_version", {"new_version": self._owner.mark(0)})
        replica.state.hosts = [str(host) for host in await self._rpc(replica, "host_name")]
        if self._lora is not None:
            await self._rpc(replica, "drop_adapter")
            # vLLM reads an adapter from this path only if its workers have none of this number: ours always have.
            await self._call(replica, "/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": "unused"})

    async def _leave(self, replica: Replica) -> None:
        await self._call(replica, "/update_weight_version", {"new_version": FREE})

    async def _check_server(self, replica: Replica) -> None:
        """Checks a server that this run did not start.

        Raises:
            UserError: of another version, or started with other arguments than it must have.
        """
        where, fix = replica.name, "start it as docs/rollout.md says"
        version = str((await self._call(replica, "/version", method="GET"))["version"])
        if version.split(".")[:2] != [str(n) for n in SUPPORTED]:
            raise UserError(
                f"{where} runs vLLM {version}",
                why=f"this engine was checked with {SUPPORTED[0]}.{SUPPORTED[1]}",
                fix=f"start it from an environment with that version: {INSTALL}",
            )
        try:
            info = await self._call(replica, "/server_info", method="GET", params={"config_format": "json"})
        except Refused as error:
            raise UserError(f"{where} takes no weights", why="VLLM_SERVER_DEV_MODE=1 is not set", fix=fix) from error
        config = info["vllm_config"]
        model, cache, scheduler = config["model_config"], config["cache_config"], config["scheduler_config"]
        found = {
            "logprobs_mode": model["logprobs_mode"],
            "generation_config": model["generation_config"],
            "async_scheduling": scheduler["async_scheduling"],
            "worker_extension_cls": config["parallel_config"]["worker_extension_cls"],
        }
        wrong = {name: value for name, value in found.items() if value != OURS[name]}
        if wrong:
            raise UserError(
                f"{where} was started with {' '.join(_flags(wrong))}",
                why=f"what it samples and says would be wrong without {' '.join(_flags({n: OURS[n] for n in wrong}))}",
                fix=fix,
            )
        if model["max_model_len"] < self.max_model_len:
            raise UserError(
                f"{where} takes {model['max_model_len']} tokens, and this run's sequences have up to "
                f"{self.max_model_len}",
                fix="start it with a larger --max-model-len, or lower data.max_prompt_tokens or "
                "rollout.max_response_tokens",
            )
        if self._lora is not None and not config.get("lora_config"):
            raise UserError(f"{where} takes no adapters", fix=f"{fix}, or set rollout.lora=merged")
        self.cache_block = int(cache["block_size"]) if cache["enable_prefix_caching"] else 0
        try:
            await self._call(
                replica, "/inference/v1/generate", {"token_ids": [0], "sampling_params": {"max_tokens": 1}}
            )
        except Refused as error:
            raise UserError(f"{where} takes no token ids", why="--enable-scale-out is not set", fix=fix) from error

    # --- requests ---

    def _check(self, request: Request) -> None:
        check_temperature(request.sampling)

    async def _generate(self, replica: Replica, job: Job) -> Piece:
        request, stop_text = job.request, self.stop_text(job)
        sampling = request.sampling
        name = uuid.uuid4().hex
        body: dict[str, Any] = {
            "request_id": name,
            "token_ids": list(job.context()),
            "sampling_params": {
                "max_tokens": job.left(),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
                "repetition_penalty": sampling.repetition_penalty,
                "logit_bias": {str(token): value for token, value in sampling.logit_bias} or None,
                "stop_token_ids": list(sampling.stop_token_ids),
                "ignore_eos": True,
                "seed": job.seed(),
                "logprobs": 0,  # of the sampled token only
                "detokenize": False,
            },
            "stream": stop_text is not None,
        }
        if self._lora is not None:
            body["model"] = ADAPTER
        if request.images:
            body |= _image_body(body["token_ids"], request.images, self._image_token)
        self._ids[job.handle] = f"generate-tokens-{name}"
        try:
            if stop_text is None:
                answer = await self._call(replica, "/inference/v1/generate", body, answers=True)
                (choice,) = answer["choices"]
                return self._piece([choice])
            chunks = []
            async for answer in self._events(replica, "/inference/v1/generate", body):
                chunks += answer["choices"]
                if any(stop_text.ends_with(token) for choice in answer["choices"] for token in choice["token_ids"]):
                    await self._abort(replica, [job])
            return self._piece(chunks)
        finally:
            if self._ids.get(job.handle, "").endswith(name):  # it may be in flight at another server already
                del self._ids[job.handle]

    def _piece(self, choices: list[dict[str, Any]]) -> Piece:
        """Joins the content of consecutive choices; the last one gives the reason that the response ended."""
        tokens = [token for choice in choices for token in choice["token_ids"] or ()]
        said = [entry["logprob"] for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        versions = [
            (self._owner.version(span["version"]), span["start"]) for span in choices[-1]["weight_versions"] or ()
        ]
        reason = choices[-1]["finish_reason"]
        assert reason in ("stop", "length", "abort"), f"vLLM ended a request with {reason!r}"
        return Piece(tokens, [math.nan if logp <= IMPOSSIBLE else logp for logp in said], reason, versions)

    async def _abort(self, replica: Replica, jobs: list[Job]) -> None:
        names = [self._ids[job.handle] for job in jobs if job.handle in self._ids]
        if names:  # none would be all
            await self._call(replica, "/abort_requests", {"request_ids": names})

    async def _pause(self, replica: Replica) -> None:
        await self._call(replica, "/pause", params={"mode": "keep"})

    async def _resume(self, replica: Replica) -> None:
        await self._call(replica, "/resume")

    async def _ping(self, replica: Replica) -> None:
        await self._rpc(replica, "host_name")

    # --- weights and memory ---

    async def _take_weights(self, replica: Replica, address: str, first: int, version: int) -> list[Receipt]:
        answers = await self._rpc(replica, "take_weights", [address, first, version, self._lora])
        for rank, answer in enumerate(answers):
            if "error" in answer:
                raise WeightSyncError(f"worker {rank} of {replica.name} could not take its weights: {answer['error']}")
        await self._call(replica, "/update_weight_version", {"new_version": self._owner.mark(version)})
        reset = await self._call(replica, "/reset_prefix_cache", params={"reset_running_requests": "true"})
        if not reset["success"]:
            raise WeightSyncError(f"{replica.name} keeps what it computed with older weights")
        if self._image_token is not None:
            await self._call(replica, "/reset_encoder_cache")
        return [Receipt(answer["version"], answer["received"], answer["num_bytes"]) for answer in answers]

    async def _sleep(self, replica: Replica) -> None:
        await self._call(replica, "/sleep", params={"level": "1"})  # weights wait in host memory: 2 would drop them

    async def _wake(self, replica: Replica) -> None:
        await self._call(replica, "/wake_up")

    async def _rpc(self, replica: Replica, method: str, arguments: Sequence[Any] = ()) -> list[Any]:
        """Calls a method on every worker of a server; returns their replies."""
        answer = await self._call(replica, "/collective_rpc", {"method": method, "args": list(arguments)})
        return list(answer["results"])

    async def _from_all(self, method: str, arguments: Sequence[Any]) -> list[list[Any]]:
        return [await self._rpc(replica, method, arguments) for replica in self._live]


def _flags(arguments: Mapping[str, Any]) -> list[str]:
    """Returns arguments as the server's command line takes them."""
    flags = []
    for name, value in arguments.items():
        dashed = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{dashed}" if value else f"--no-{dashed}")
        elif value is not None:
            flags += [f"--{dashed}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def require_vllm_at(python: str) -> str:
    """Returns one line on the vLLM in the environment of an interpreter, without importing it.

    Raises:
        UserError: it is not there, or of another version.
    """
    code = (
        "from importlib.metadata import distributions as d\n"
        "print(*[x.version for x in d() if x.metadata['Name'] in ('vllm', 'vllm-cpu')])"
    )
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"rollout.python {python} does not run: {error}") from error
    if not found:
        raise UserError(f"vLLM is not installed in the environment of {python}", why="servers need it", fix=INSTALL)
    if found[0].split(".")[:2] != [str(n) for n in SUPPORTED]:
        raise UserError(
            f"vLLM {found[0]}, in the environment of {python}, is not supported",
            why="the engine relies on what changes between minor versions; it was checked with 0.32",
            fix=INSTALL,
        )
    return f"vLLM {found[0]} of {python}, behind HTTP servers"


def _image_body(token_ids: Sequence[int], images: Sequence[Any], token: int | None) -> dict[str, Any]:
    """Returns the fields of a request with images: each image is one token, which the server expands."""
    parts = []
    for image in images:
        png = io.BytesIO()
        image.save(png, format="PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        parts.append({"type": "image_url", "url": url})
    short = [t for i, t in enumerate(token_ids) if t != token or i == 0 or token_ids[i - 1] != token]
    return {"token_ids": short, "content_parts": parts, "return_token_ids": True}
