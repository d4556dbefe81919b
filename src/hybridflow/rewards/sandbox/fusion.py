"""Programs on a Sandbox Fusion server, by its HTTP protocol: POST {url}/run_code. github.com/bytedance/SandboxFusion.

The server contains the program; no part of it runs here. Tests that are assert statements are refused: their expected
values would have to be where the program is.
"""

from __future__ import annotations

import atexit
import json
from pathlib import Path
from typing import Any

from hybridflow.rewards.http import CallFailed, LimitedClient
from hybridflow.rewards.sandbox import calls, values
from hybridflow.rewards.sandbox.outcome import Limits, Outcome, SandboxError, Status

NETWORK_SECONDS = 30.0  # for the way there and back, and for waiting in the server's queue
_MARK = "result of the call:"


class FusionSandbox:
    """Runs programs on a server, at most `parallel` at once.

    Args:
        url: of the server, such as http://host:8080.
        limits: sent along; the output is cut here as well.
        parallel: requests at once.

    Raises:
        UserError: aiohttp is not installed.
    """

    def __init__(self, url: str, limits: Limits, parallel: int) -> None:
        self.url, self.limits, self.parallel = url.rstrip("/"), limits, parallel
        self._client = LimitedClient(concurrency=parallel, timeout=limits.seconds + NETWORK_SECONDS)
        atexit.register(self._client.close)  # a sandbox lives as long as its process

    def run(self, program: str, stdin: str) -> Outcome:
        """See `Sandbox.run`."""
        return self._outcome(self._post({"code": program, "stdin": stdin}))

    def call(self, program: str, name: str, arguments: list[object]) -> Outcome:
        """See `Sandbox.call`. The result is the last line of what the server says the program wrote."""
        sources = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (values, calls)]
        request = json.dumps(calls.function_call(name, arguments))
        code = (
            "space = {'__name__': 'driver'}\n"
            f"for source in {sources!r}: exec(compile(source, 'driver.py', 'exec'), space)\n"
            f"print({_MARK!r}, space['answer']({program!r}, {request!r}))\n"
        )
        outcome = self.run(code, "")
        _, found, result = outcome.stdout.rpartition(_MARK)
        return Outcome(
            outcome.status,
            stdout=outcome.stdout,
            stderr=outcome.stderr,
            code=outcome.code,
            result=result if found else "",
        )

    def check(self, program: str, test: str) -> Outcome:
        """Refuses tests that are assert statements.

        Raises:
            SandboxError: always.
        """
        raise SandboxError(
            "tests that are assert statements need a local sandbox (reward.sandbox.backend=local): on a server their "
            "expected values would be in reach of the program"
        )

    def _outcome(self, reply: dict[str, Any]) -> Outcome:
        result = reply.get("run_result")
        if reply.get("status") not in ("Success", "Failed") or not isinstance(result, dict):
            raise SandboxError(f"the server {self.url} could not run a program: {str(reply.get('message'))[:200]}")
        most = self.limits.output_kb << 10
        stdout, stderr = (str(result.get(name) or "") for name in ("stdout", "stderr"))
        code = result.get("return_code")
        status: Status
        if result.get("status") == "TimeLimitExceeded":
            status = "timeout"
        elif result.get("status") != "Finished":
            raise SandboxError(f"the server {self.url} could not run a program: {stderr[:200]}")
        elif len(stdout) > most:
            status = "output"
        else:
            status = "ok" if code == 0 else "error"
        return Outcome(status, stdout=stdout[:most], stderr=stderr[:most], code=int(code or 0))

    def _post(self, what: dict[str, str]) -> dict[str, Any]:
        body = what | {
            "language": "python",
            "run_timeout": self.limits.seconds,
            "compile_timeout": self.limits.seconds,
            "memory_limit_MB": self.limits.memory_mb,
        }
        try:
            reply = self._client.post(f"{self.url}/run_code", body).result()
        except CallFailed as error:
            raise SandboxError(str(error)) from error
        if not isinstance(reply, dict):
            raise SandboxError(f"the server {self.url} answered {str(reply)[:100]!r}, not an object")
        return reply
