"""A process around SGLang's Engine object, which serves the process that started it over a socket.

``python -m hybridflow.rollout.sglang.host SOCKET ARGUMENTS``: the path of a listening Unix socket, and the engine's
arguments in JSON. A line of JSON goes either way: {"number", "path", "body"} in, {"number", "status", "content"} out;
paths are those of SGLang's HTTP interface. The first line out, number 0, says that the engine has started.

Why a process of its own: SGLang's Engine kills all children of its process when it ends, also those that it did not
start, and the process itself when a scheduler fails; it also sets how processes are started and when garbage is
collected.
"""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from collections.abc import Mapping
from typing import Any

LINE = 1 << 30  # bytes of the longest line


class Refusal(Exception):
    """SGLang refused a request."""


class EngineHost:
    """Answers from an engine.

    Args:
        engine: SGLang's.
    """

    def __init__(self, engine: Any) -> None:
        from sglang.srt.managers import io_struct as io

        self._engine, self._manager = engine, engine.tokenizer_manager
        self._requests = io
        self._controls: Mapping[str, type[Any]] = {
            "pause_generation": io.PauseGenerationReqInput,
            "continue_generation": io.ContinueGenerationReqInput,
            "begin_weight_update": io.BeginWeightUpdateReqInput,
            "end_weight_update": io.EndWeightUpdateReqInput,
            "update_weights_from_tensor": io.UpdateWeightsFromTensorReqInput,
            "release_memory_occupation": io.ReleaseMemoryOccupationReqInput,
            "resume_memory_occupation": io.ResumeMemoryOccupationReqInput,
        }

    async def serve(self, path: str) -> None:
        """Answers calls until the other end closes."""
        reader, writer = await asyncio.open_unix_connection(path, limit=LINE)
        tasks: set[asyncio.Task[None]] = set()

        async def answer(asked: Mapping[str, Any]) -> None:
            status, content = await self._answer(asked["path"].strip("/"), asked.get("body"))
            writer.write(json.dumps({"number": asked["number"], "status": status, "content": content}).encode() + b"\n")

        await answer({"number": 0, "path": "/server_info"})
        while line := await reader.readline():
            task = asyncio.create_task(answer(json.loads(line)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Returns the HTTP status and the content."""
        try:
            return 200, await self._do(path, body)
        except (ValueError, Refusal) as error:
            return 400, str(error)
        except Exception as error:
            traceback.print_exc()
            return 500, f"{type(error).__name__}: {error}"

    async def _do(self, path: str, body: Any) -> Any:
        manager = self._manager
        if path == "generate":
            answers = manager.generate_request(self._requests.GenerateReqInput(**body))
            return [answer async for answer in answers][-1]
        if path == "abort_request":
            return manager.abort_request(rid=body["rid"])
        if path == "server_info":
            await manager.get_internal_state()  # the schedulers answer this
            wanted = ("tp_size", "skip_tokenizer_init", "page_size", "disable_radix_cache")
            return {name: self._engine.server_args.resolved_dict()[name] for name in wanted}
        answer = await getattr(manager, path)(self._controls[path](**(body or {})))
        if isinstance(answer, tuple) and not answer[0]:
            raise Refusal(f"/{path}: {answer[1]}")
        return None


def main() -> None:
    """Runs an engine until its socket is closed."""
    from sglang.srt.entrypoints.engine import Engine

    path, arguments = sys.argv[1:]
    engine = Engine(**json.loads(arguments))
    engine.loop.run_until_complete(EngineHost(engine).serve(path))
    engine.shutdown()


if __name__ == "__main__":  # SGLang starts its schedulers from a new interpreter, which imports this file
    main()
