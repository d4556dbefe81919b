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

from hybridflow.errors import UserError
from hybridflow.rollout.job import Decode
from hybridflow.rollout.served.http import Owner
from hybridflow.rollout.served.model_folder import check_model
from hybridflow.rollout.served.process import ServerProcess, import_path, start_server
from hybridflow.rollout.served.replica import Replica, ReplicaFailed, ReplicaLost
from hybridflow.rollout.sglang.host import LINE
from hybridflow.rollout.sglang.start import arguments, environment, require_sglang
from hybridflow.rollout.sglang.talk import SglangTalk
from hybridflow.rollout.startup import EngineModel, Launch, Supervision
from hybridflow.sockets import socket_parent
from hybridflow.weights.channel import WeightRoute

GONE = 5.0  # seconds until a process whose socket is closed has ended


@dataclass(slots=True)
class _Host:
    """What a replica is here.

    Args:
        process: the one around the engine.
        writer: where lines go in.
        reader: takes the lines that come out.
        waiting: the future of each reply, by number.
    """

    process: ServerProcess | None = None
    writer: asyncio.StreamWriter | None = None
    reader: asyncio.Task[None] | None = None
    waiting: dict[int, asyncio.Future[tuple[int, Any]]] = field(default_factory=dict)


class SglangEngine(SglangTalk):
    """A `RolloutEngine` on an SGLang Engine object in a process of its own.

    Args:
        model: what it computes.
        launch: where its process is started: an environment with SGLang.
        supervision: when it counts as hung, and how often it is started again.
        route: how weights travel.
        decode: token ids to text; needed by requests with stop texts only.

    Raises:
        UserError: SGLang is missing, of another version, or refuses the configuration; no model in the folder, or one
            whose heads `tensor_parallel` does not divide.
    """

    def __init__(
        self,
        model: EngineModel,
        *,
        launch: Launch | None = None,
        supervision: Supervision | None = None,
        route: WeightRoute | None = None,
        decode: Decode | None = None,
    ) -> None:
        launch = launch or Launch()
        check_model(model)
        require_sglang(launch.python)
        self._arguments = arguments(model)
        self._python = launch.python or sys.executable
        self._log_folder = Path(launch.run_folder or tempfile.mkdtemp(prefix="hybridflow-"))
        self._numbers = itertools.count(1)
        super().__init__(
            ["the SGLang engine"],
            max_model_len=model.max_model_len,
            managed=True,
            supervision=supervision,
            route=route,
            decode=decode,
        )
        for replica in self._live:
            replica.state = _Host()
        self._set_up(Owner(socket.gethostname(), os.getpid(), ""), one_host=True)
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
            await asyncio.wait(
                {started, ended}, timeout=self.supervision.start_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            server.close()
        if ended.done():
            raise ReplicaLost(f"did not start: it {process.death()}")
        ended.cancel()
        if not started.done():
            raise ReplicaLost(
                f"did not start within {self.supervision.start_timeout:g} s (rollout.start_timeout): see {process.log}"
            )
        await self._look(replica, self._said(replica, "/server_info", *await started))

    async def _read(self, host: _Host, reader: asyncio.StreamReader) -> None:
        """Hands replies to the calls that wait for them, until the process ends."""
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
