"""Generation with SGLang's HTTP server."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hybridflow.config.sections.placement import Transport
from hybridflow.errors import UserError
from hybridflow.rollout.job import Decode
from hybridflow.rollout.served.http import FREE, Refused, ServerEngine
from hybridflow.rollout.served.model_folder import check_model
from hybridflow.rollout.served.replica import Replica
from hybridflow.rollout.sglang.start import MARGIN, OURS, arguments, check_version, environment, flags, require_sglang
from hybridflow.rollout.sglang.talk import SglangTalk

LOCAL = {"127.0.0.1", "localhost", "::1"}


class SglangServerEngine(ServerEngine, SglangTalk):
    """A `RolloutEngine` on one or several SGLang servers.

    Args:
        model_folder: model in Hugging Face format that servers are started with; None where they run already.
        max_model_len: most tokens of a sequence, prompt and answer together.
        servers: addresses of servers that run already, as ``http://host:port``; see docs/rollout.md.
        replicas: how many servers to start, where none is given.
        tensor_parallel: processes of each of these that share one copy of the model.
        python: the interpreter of an environment with SGLang; None is this one.
        log_folder: where servers write what they print; None: a new folder for temporary files.
        start_timeout: seconds that a server may take until it answers.
        answer_timeout: seconds of silence after which a server with unanswered requests counts as hung.
        restarts: how often each server is started again.
        transport: ``placement.transport``.
        folder: ``placement.folder``.
        delta: ``placement.delta``.
        decode: token ids to text; needed by requests with stop texts only.
        seed: seed of SGLang's own generators, which requests do not use.
        engine_args: more of SGLang's server arguments, for servers that are started, such as `max_running_requests`,
            `max_total_tokens`, `mem_fraction_static`, `attention_backend`.
        dtype: what these compute in; by default "float32" on CPUs, "bfloat16" elsewhere.
        owner: the run's folder: what others are told who want the same server.

    Raises:
        UserError: SGLang is missing, of another version, or refuses the configuration; a server does not answer, was
            started with other arguments than it must have, or samples for another run.
    """

    def __init__(
        self,
        model_folder: str | Path | None,
        *,
        max_model_len: int,
        servers: Sequence[str] = (),
        replicas: int = 1,
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
        owner: str = "",
    ) -> None:
        assert servers or model_folder is not None, "servers that are started need a model"
        if not servers:
            assert model_folder is not None
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
        super().__init__(
            servers=servers,
            replicas=replicas,
            python=python or sys.executable,
            log_folder=Path(log_folder or tempfile.mkdtemp(prefix="hybridflow-")),
            start_timeout=start_timeout,
            answer_timeout=answer_timeout,
            restarts=restarts,
            transport=transport,
            folder=folder,
            delta=delta,
            decode=decode,
            owner=owner,
        )
        self._set_up(max_model_len, self._owner, one_host=all(urlsplit(url).hostname in LOCAL for url in servers))
        self.open()

    def _command(self, port: int) -> list[str]:
        named = {**self._arguments, "host": "127.0.0.1", "port": port}
        return [self.python, "-m", "sglang.launch_server", *flags(named)]

    def _environment(self) -> dict[str, str]:
        return environment(self._arguments["tp_size"])

    async def _settle(self, replica: Replica) -> None:
        try:
            info = await self._call(replica, "/server_info", method="GET")
        except Refused as error:
            if error.status != 404:
                raise
            info = await self._call(replica, "/get_server_info", method="GET")  # what older servers call it
        check_version(str(info["version"]), f"{replica.name} runs SGLang, whose version")
        if not self.managed:
            self._check_server(replica, info)
        model = await self._call(replica, "/model_info", method="GET")
        self._claim(replica, str(model["weight_version"]))
        await self._look(replica, info)
        replica.state.hosts = self._lines[replica.name].hosts

    async def _leave(self, replica: Replica) -> None:
        await self._call(replica, "/update_weight_version", {"new_version": FREE, "abort_all_requests": False})

    def _check_server(self, replica: Replica, info: Mapping[str, Any]) -> None:
        """Looks at a server that somebody else started.

        Raises:
            UserError: it was started with other arguments than it must have.
        """
        wanted = OURS | {"dp_size": 1, "pp_size": 1, "speculative_algorithm": None}
        wrong = {name: value for name, value in wanted.items() if info.get(name) != value}
        if wrong:
            raise UserError(
                f"{replica.name} was started with {', '.join(f'{name} {info.get(name)}' for name in wrong)}",
                why="weights, log-probabilities and noise would not be this library's",
                fix="start it with " + " ".join(flags(wrong)),
            )
        context = int(info["max_req_input_len"]) + MARGIN - 2  # what is left of its context length, less what it keeps
        if context < self.max_model_len + MARGIN:
            raise UserError(
                f"{replica.name} takes sequences of {context - MARGIN} tokens, and this run's have up to "
                f"{self.max_model_len}",
                fix=f"start it with --context-length {self.max_model_len + MARGIN}, or lower data.max_prompt_tokens or "
                "rollout.max_response_tokens",
            )
