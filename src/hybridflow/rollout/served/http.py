"""Engines behind HTTP: servers that run already, or servers that this process starts, watches and ends.

`ServerEngine` is an `AsyncEngine` over HTTP; its subclasses know the requests of each kind of server. A server samples
for one run at a time: its weight version, which servers of both kinds store and report, carries the name of the run.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import tempfile
from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from hybridflow.errors import UserError
from hybridflow.rollout.job import Decode
from hybridflow.rollout.served.engine import AsyncEngine
from hybridflow.rollout.served.process import ServerProcess, free_port, import_path, start_server
from hybridflow.rollout.served.replica import Replica, ReplicaFailed, ReplicaLost
from hybridflow.rollout.startup import Launch, Supervision
from hybridflow.weights.channel import WeightRoute

CONNECTIONS = 400  # most requests in flight at one server: each holds a file handle at both ends
KEEP_ALIVE = 2.0  # seconds for which an idle connection is reused: fewer than any server keeps it
LOOK_AGAIN = 0.1  # seconds between two checks whether a starting server answers
GONE = 5.0  # seconds until a process whose port is closed has ended, with all that it started
FREE = "default"  # weight version of a server without an owner
SAID = 400  # characters of a server's error in our messages


@dataclass(slots=True)
class Server:
    """What a replica is here.

    Args:
        url: ``http://host:port``.
        process: where we started it.
        starting: whether it was not up yet.
        ours: whether it was free for this run.
        hosts: of its processes, as it says.
    """

    url: str = ""
    process: ServerProcess | None = None
    starting: bool = True
    ours: bool = False
    hosts: list[str] = field(default_factory=list)


class Refused(UserError):
    """A server answered 4xx."""

    def __init__(self, what: str, *, why: str, status: int) -> None:
        super().__init__(what, why=why)
        self.status = status


@dataclass(frozen=True, slots=True)
class Owner:
    """The run that a server samples for; other runs read it from the server's weight version.

    Args:
        host: where the run's controller is.
        pid: its process.
        run: its folder, or "".
    """

    host: str
    pid: int
    run: str

    def mark(self, version: int) -> str:
        """Returns a weight version with the owner's name."""
        return f"{version} of {self.host} {self.pid} {self.run}"

    def version(self, mark: str) -> int:
        """Returns the weight version in a mark.

        Raises:
            UserError: the mark is of another run, which has taken the server meanwhile.
        """
        version = mark.partition(" of ")[0]
        if mark != self.mark(int(version) if version.isdecimal() else -1):
            raise UserError(
                f"a server that this run samples from was taken by another run: its weights are {mark!r}",
                why="two runs that give one server their weights would both sample from the wrong ones",
                fix="give every run servers of its own",
            )
        return int(version)

    def may_take(self, mark: str) -> bool:
        """Returns whether a server with this weight version is free: it has no owner, this run is the owner, or the
        owner's process has ended.
        """
        _, of, owner = mark.partition(" of ")
        if not of:  # FREE, or a mark that was written by hand
            return True
        host, _, rest = owner.partition(" ")
        pid, _, run = rest.partition(" ")
        if run and run == self.run:
            return True  # a folder belongs to one run at a time
        return host == self.host and pid.isdecimal() and not _runs(int(pid))


class ServerEngine(AsyncEngine):
    """An `AsyncEngine` whose replicas are HTTP servers.

    Args:
        servers: addresses of servers that run already; empty: `replicas` are started.
        replicas: how many to start.
        max_model_len: see `AsyncEngine`; so are `supervision`, `route` and `decode`.
        launch: where they are started. Other runs see its folder as the owner of a server.
        supervision: when a server counts as hung, and how often each is started again.
        route: how weights travel.
        decode: token ids to text.
    """

    def __init__(
        self,
        *,
        servers: Sequence[str],
        replicas: int,
        max_model_len: int,
        launch: Launch,
        supervision: Supervision | None,
        route: WeightRoute | None,
        decode: Decode | None,
    ) -> None:
        names = [f"the server {url}" for url in servers] or [f"server {i}" for i in range(replicas)]
        super().__init__(
            names,
            max_model_len=max_model_len,
            managed=not servers,
            supervision=supervision,
            route=route,
            decode=decode,
        )
        self.python = launch.python or sys.executable
        self.log_folder = Path(launch.run_folder or tempfile.mkdtemp(prefix="hybridflow-"))
        self._owner = Owner(socket.gethostname(), os.getpid(), str(launch.run_folder or ""))
        for i, replica in enumerate(self._live):
            replica.state = Server(servers[i].rstrip("/") if servers else "")
        self._http = _aiohttp()
        self._sessions: tuple[Any, Any] | None = None

    # --- what a subclass fills in ---

    @abstractmethod
    def _command(self, port: int) -> list[str]:
        """Returns the command that starts a server on a port of 127.0.0.1."""

    @abstractmethod
    def _environment(self) -> dict[str, str]:
        """Returns the environment variables of a server that this process starts."""

    @abstractmethod
    async def _settle(self, replica: Replica) -> None:
        """Checks that a server which answers fits the run, claims it, and asks for its hosts."""

    @abstractmethod
    async def _leave(self, replica: Replica) -> None:
        """Releases a server for other runs: its weight version is `FREE` again."""

    # --- calls ---

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
        """Returns the JSON (or text) that a server answers.

        Args:
            replica: whose server.
            path: such as "/health".
            body: is sent as JSON.
            method: of HTTP.
            params: of the query.
            answers: whether it is one of many long calls; others have connections of their own.

        Raises:
            ReplicaLost: nothing listens there, or the process has ended.
            Failed: it answered 5xx, or closed the connection.
            UserError: it answered 4xx.
        """
        async with self._response(replica, path, body, method, params, answers) as response:
            return await (response.json() if response.content_type == "application/json" else response.text())

    async def _events(self, replica: Replica, path: str, body: Any) -> AsyncIterator[Any]:
        """Yields the JSON of every event that a server streams; see `_call`."""
        async with self._response(replica, path, body, "POST", None, True) as response:
            async for line in response.content:
                said = line.removeprefix(b"data:").strip()
                if said and said != b"[DONE]":
                    event = json.loads(said)
                    if "error" in event:
                        raise ReplicaFailed(f"{path} answers {str(event['error'])[:SAID]}")
                    yield event

    @asynccontextmanager
    async def _response(
        self, replica: Replica, path: str, body: Any, method: str, params: Mapping[str, str] | None, answers: bool
    ) -> AsyncIterator[Any]:
        client = self._http
        if self._sessions is None:
            forever = client.ClientTimeout(total=None)
            many = client.TCPConnector(limit=0, limit_per_host=CONNECTIONS, keepalive_timeout=KEEP_ALIVE)
            single = client.TCPConnector(limit=0, force_close=True)
            of_many, of_single = (client.ClientSession(connector=c, timeout=forever) for c in (many, single))
            self._sessions = of_many, of_single
        session = self._sessions[0 if answers else 1]
        try:
            async with session.request(method, replica.state.url + path, json=body, params=params) as response:
                if response.status >= 400:
                    said = f"{path} answers {response.status}: {(await response.text())[:SAID]}"
                    if response.status >= 500:
                        raise ReplicaFailed(said)
                    raise Refused(f"{replica.name} refuses a request", why=said, status=response.status)
                yield response
        except client.ClientConnectorError as error:
            raise await self._gone(replica, error) from error
        except (client.ClientError, OSError) as error:
            raise ReplicaFailed(f"closed the connection during {path} ({type(error).__name__}: {error})") from error

    async def _gone(self, replica: Replica, error: Exception) -> ReplicaLost:
        """Returns the reason that nothing listens there."""
        server: Server = replica.state
        if server.process is not None and not server.starting:
            with suppress(TimeoutError):
                async with asyncio.timeout(GONE):
                    await server.process.ended()
            death = server.process.death()
            if death is not None:
                return ReplicaLost(death)
        return ReplicaLost(f"does not answer ({error})")

    # --- start and end ---

    async def _start(self, replica: Replica) -> None:
        server: Server = replica.state
        server.starting = True
        if self.managed:
            port = free_port()
            log = self.log_folder / f"{replica.name.replace(' ', '-')}.log"
            server.url = f"http://127.0.0.1:{port}"
            environment = {"PYTHONPATH": import_path(self.log_folder)} | self._environment()
            server.process = await start_server(self._command(port), environment, log)
            await self._until_ready(replica, server.process)
        try:
            async with asyncio.timeout(self.supervision.start_timeout):
                await self._settle(replica)
        except TimeoutError as error:
            raise ReplicaLost(
                f"did not answer within {self.supervision.start_timeout:g} s (rollout.start_timeout)"
            ) from error
        except ReplicaFailed as error:
            raise ReplicaLost(str(error)) from error
        server.starting = False

    async def _until_ready(self, replica: Replica, process: ServerProcess) -> None:
        """Returns when a server that was started answers.

        Raises:
            ReplicaLost: it ended, or it took longer than it may.
        """
        ended, ready = asyncio.create_task(process.ended()), asyncio.create_task(self._first_answer(replica))
        await asyncio.wait([ended, ready], timeout=self.supervision.start_timeout, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            return await ready
        if ended.done():
            raise ReplicaLost(f"did not start: it {process.death()}")
        ready.cancel()
        raise ReplicaLost(
            f"did not answer within {self.supervision.start_timeout:g} s after it was started "
            f"(rollout.start_timeout): see {process.log}"
        )

    async def _first_answer(self, replica: Replica) -> None:
        while True:
            try:
                await self._call(replica, "/health", method="GET")
                return
            except (ReplicaFailed, ReplicaLost):
                await asyncio.sleep(LOOK_AGAIN)

    async def _end(self, replica: Replica) -> None:
        server: Server = replica.state
        if server.process is not None:
            await server.process.end()

    async def _close(self) -> None:
        await super()._close()
        if not self.managed:
            for replica in (r for r in self._live if r.state.ours):
                with suppress(Exception):  # its errors do not matter: it is no longer ours
                    async with asyncio.timeout(GONE):
                        await self._leave(replica)
        for session in self._sessions or ():
            await session.close()

    def _hosts(self, replica: Replica) -> list[str]:
        return list(replica.state.hosts)

    def _claim(self, replica: Replica, mark: str) -> None:
        """Takes a server for this run, or refuses it if it samples for another.

        Args:
            replica: whose server.
            mark: its weight version.

        Raises:
            UserError: see above.
        """
        if not self._owner.may_take(mark):
            raise UserError(
                f"{replica.name} samples for another run: its weights are {mark!r}",
                why="two runs that give one server their weights would both sample from the wrong ones",
                fix="give every run servers of its own; if that run has ended on another host, start the server again",
            )
        replica.state.ours = True


def _aiohttp() -> ModuleType:
    try:
        import aiohttp
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise UserError(
            "aiohttp is not installed in this environment",
            why="rollout.mode is server",
            fix="pip install 'hybridflow[server]'",
        ) from error
    return aiohttp


def _runs(pid: int) -> bool:
    """Returns whether a process of this host runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
