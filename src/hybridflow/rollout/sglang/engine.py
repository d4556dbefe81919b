"""Generation with SGLang's Engine object, beside this process: without HTTP, a port, or a server to look after.

The object lives in a process of its own (`sglang/host.py` says why), which ends with this one. Everything else is as
with servers.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridflow.config.sections.placement import Transport
from hybridflow.errors import UserError
from hybridflow.rollout.job import Decode
from hybridflow.rollout.served.http import Owner
from hybridflow.rollout.served.model_folder import check_model
from hybridflow.rollout.served.process import ServerProcess, import_path, start_server
from hybridflow.rollout.served.replica import Replica, ReplicaFailed, ReplicaLost
from hybridflow.rollout.sglang.host import LINE
from hybridflow.rollout.sglang.start import arguments, environment, require_sglang
from hybridflow.rollout.sglang.talk import SglangTalk
from hybridflow.sockets import socket_parent

GONE = 5.0  # seconds until a process whose socket is closed is over


@dataclass(slots=True)
class _Host:
    """What a replica is here.

    Args:
        process: the one around the engine.
        writer: where lines go in.
        reader: takes the lines that come out.
        waiting: who waits for which answer.
    """

    process: ServerProcess | None = None
    writer: asyncio.StreamWriter | None = None
    reader: asyncio.Task[None] | None = None
    waiting: dict[int, asyncio.Future[tuple[int, Any]]] = field(default_factory=dict)


class SglangEngine(SglangTalk):
    """A `RolloutEngine` on an SGLang Engine object in a process of its own.

    Args:
        model_folder: model in Hugging Face format. Its weights are those of version 0.
        max_model_len: most tokens of a sequence, prompt and answer together.
        tensor_parallel: processes that share one copy of the model.
        python: the interpreter of an environment with SGLang; None is this one.
        log_folder: where it writes what it prints; None: a new folder for temporary files.
        start_timeout: seconds that it may take to start.
        answer_timeout: seconds of silence after which an engine with unanswered requests counts as hung.
        restarts: how often it is started again.
        transport: ``placement.transport``.
        folder: ``placement.folder``.
        delta: ``placement.delta``.
        decode: token ids to text; needed by requests with stop texts only.
        seed: seed of SGLang's own generators, which requests do not use.
        engine_args: more of SGLang's server arguments, such as `max_running_requests`, `max_total_tokens`,
            `mem_fraction_static`, `attention_backend`.
        dtype: what it computes in; by default "float32" on CPUs, "bfloat16" elsewhere.

    Raises:
        UserError: SGLang is missing, of another version, or refuses the configuration; no model in the folder, or one
            whose heads `tensor_parallel` does not divide.
    """

    def __init__(
        self,
        model_folder: str | Path,
        *,
        max_model_len: int,
        tensor_parallel: int = 1,
        python: str | None = None,
        log_folder: str | Path | None = None,
        start_timeout: float = 600,
        answer_timeout: float = 600,
        restarts: int = 3,
        transport: Transport = "auto",
        folder: str | None = None,
        delta: bool = False,
        decode: Decode | None = None,
        seed: int = 0,
        engine_args: Mapping[str, Any] | None = None,
        dtype: str | None = None,
    ) -> None:
        check_model(model_folder, tensor_parallel)
        require_sglang(python)
        self._arguments = arguments(
            model_folder,
            max_model_len=max_model_len,
            tensor_parallel=tensor_parallel,
            seed=seed,
            dtype=dtype,
            wanted=engine_args or {},
        )
        self._python, self._log_folder = (
            python or sys.executable,
            Path(log_folder or tempfile.mkdtemp(prefix="hybridflow-")),
        )
        self._start_timeout = start_timeout
        self._numbers = itertools.count(1)
        super().__init__(
            ["the SGLang engine"],
            managed=True,
            answer_timeout=answer_timeout,
            restarts=restarts,
            transport=transport,
            folder=folder,
            delta=delta,
            decode=decode,
        )
        for replica in self._live:
            replica.state = _Host()
        self._set_up(max_model_len, Owner(socket.gethostname(), os.getpid(), ""), one_host=True)
        self.open()

    async def _start(self, replica: Replica) -> None:
        replica.state = host = _Host()
        started = self._loop.create_future()
        host.waiting[0] = started

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            host.writer = writer
            host.reader = asyncio.create_task(self._read(host, reader))

        with tempfile.TemporaryDirectory(prefix="hybridflow-", dir=socket_parent()) as folder:
            path = f"{folder}/sglang"
            server = await asyncio.start_unix_server(connected, path, limit=LINE)
            command = [self._python, "-m", "hybridflow.rollout.sglang.host", path, json.dumps(self._arguments)]
            variables = {"PYTHONPATH": import_path(self._log_folder)} | environment(self._arguments["tp_size"])
            host.process = process = await start_server(command, variables, self._log_folder / "sglang-engine.log")
            ended = asyncio.create_task(process.ended())
            await asyncio.wait({started, ended}, timeout=self._start_timeout, return_when=asyncio.FIRST_COMPLETED)
            server.close()
        if ended.done():
            raise ReplicaLost(f"did not start: it {process.death()}")
        ended.cancel()
        if not started.done():
            raise ReplicaLost(
                f"did not start within {self._start_timeout:g} s (rollout.start_timeout): see {process.log}"
            )
        await self._look(replica, self._said(replica, "/server_info", *await started))

    async def _read(self, host: _Host, reader: asyncio.StreamReader) -> None:
        """Gives answers to who waits for them, until the process ends."""
        while line := await reader.readline():
            answer = json.loads(line)
            future = host.waiting.pop(answer["number"], None)
            if future is not None and not future.done():
                future.set_result((answer["status"], answer["content"]))
        assert host.process is not None
        await asyncio.wait([asyncio.create_task(host.process.ended())], timeout=GONE)
        why = host.process.death() or "closed its socket"
        for future in host.waiting.values():
            if not future.done():
                future.set_exception(ReplicaLost(why))

    async def _call(
        self,
        replica: Replica,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        params: Mapping[str, str] | None = None,
        answers: bool = False,
    ) -> Any:
        host: _Host = replica.state
        if host.writer is None or host.process is None or host.reader is None or host.reader.done():
            raise ReplicaLost((host.process and host.process.death()) or "has no connection")
        number, future = next(self._numbers), self._loop.create_future()
        host.waiting[number] = future
        host.writer.write(json.dumps({"number": number, "path": path, "body": body}).encode() + b"\n")
        try:
            return self._said(replica, path, *await future)
        finally:
            host.waiting.pop(number, None)

    def _said(self, replica: Replica, path: str, status: int, content: Any) -> Any:
        if status >= 500:
            raise ReplicaFailed(f"{path} answers {status}: {content}")
        if status >= 400:
            raise UserError(f"{replica.name} refuses a request", why=f"{path} answers {status}: {content}")
        return content

    async def _end(self, replica: Replica) -> None:
        host: _Host = replica.state
        if host.process is not None:
            await host.process.end()
