"""Generation with SGLang's HTTP server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from hybridflow.errors import UserError
from hybridflow.rollout.job import Decode
from hybridflow.rollout.served.http import FREE, Refused, ServerEngine
from hybridflow.rollout.served.model_folder import check_model
from hybridflow.rollout.served.replica import Replica
from hybridflow.rollout.sglang.start import MARGIN, OURS, arguments, check_version, environment, flags, require_sglang
from hybridflow.rollout.sglang.talk import SglangTalk
from hybridflow.rollout.startup import EngineModel, Launch, Supervision
from hybridflow.weights.channel import WeightRoute

LOCAL = {"127.0.0.1", "localhost", "::1"}


class SglangServerEngine(ServerEngine, SglangTalk):
    """A `RolloutEngine` on one or several SGLang servers.

    Args:
        model: what servers compute. Of servers that run already `max_model_len` alone is read.
        servers: addresses of servers that run already, as ``http://host:port``; see docs/rollout.md.
        replicas: how many servers to start, where none is given.
        launch: where these are started: an environment with SGLang. Other runs see its folder as the owner of a server.
        supervision: when a server counts as hung, and how often each is started again.
        route: how weights travel.
        decode: token ids to text; needed by requests with stop texts only.

    Raises:
        UserError: SGLang is missing, of another version, or refuses the configuration; a server does not answer, was
            started with other arguments than it must have, or samples for another run.
    """

    def __init__(
        self,
        model: EngineModel,
        *,
        servers: Sequence[str] = (),
        replicas: int = 1,
        launch: Launch | None = None,
        supervision: Supervision | None = None,
        route: WeightRoute | None = None,
        decode: Decode | None = None,
    ) -> None:
        launch = launch or Launch()
        if not servers:
            check_model(model)
            require_sglang(launch.python)
            self._arguments = arguments(model)
        super().__init__(
            servers=servers,
            replicas=replicas,
            max_model_len=model.max_model_len,
            launch=launch,
            supervision=supervision,
            route=route,
            decode=decode,
        )
        self._set_up(self._owner, one_host=all(urlsplit(url).hostname in LOCAL for url in servers))
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
        """Checks a server that this run did not start.

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
