"""A little server that speaks as much of vLLM's protocol as `VllmServerEngine` does, and misbehaves when it is told to.

It runs in a process of its own, so that it can be killed, stopped and found to be gone. Its tokens are a function of
prompt, seed, place and weight version. ``POST /behave`` sets what it does from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any

VERSION = "0.32.0"


def token_of(prompt: list[int], seed: int, place: int, version: str) -> int:
    """What it samples."""
    return zlib.crc32(json.dumps([prompt, seed, place, version.split()[0]]).encode()) % 90


class Peer:
    """Its state."""

    def __init__(self) -> None:
        self.version = "default"
        self.running = asyncio.Event()
        self.running.set()
        self.aborted: dict[str, asyncio.Event] = {}
        self.served: list[list[int]] = []  # prompts, in order of arrival
        self.fail = self.close = 0  # so many requests are answered with 500; are not answered at all
        self.delay = 0.0  # seconds per token
        self.deaf = False  # never answers anything
        self.dev = self.scale_out = True
        self.answered = VERSION

    async def generate(self, request: Any) -> Any:
        from aiohttp import web

        body = await request.json()
        if not self.scale_out:
            return web.json_response({"error": "start with --enable-scale-out"}, status=403)
        self.served.append(body["token_ids"])
        if self.fail:
            self.fail -= 1
            return web.json_response({"error": {"message": "CUDA error: out of memory"}}, status=500)
        if self.close:
            self.close -= 1
            request.transport.close()
            return web.Response()
        sampling = body["sampling_params"]
        name = f"generate-tokens-{body.get('request_id')}"
        stopped = self.aborted.setdefault(name, asyncio.Event())
        tokens: list[int] = []
        versions: list[dict[str, Any]] = []
        while len(tokens) < sampling["max_tokens"]:
            if self.delay:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stopped.wait(), self.delay)
            if not self.running.is_set():
                waits = [asyncio.create_task(e.wait()) for e in (stopped, self.running)]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if stopped.is_set():
                break
            if not versions or versions[-1]["version"] != self.version:
                versions.append({"version": self.version, "start": len(tokens)})
            tokens.append(token_of(body["token_ids"], sampling.get("seed", 0), len(tokens), self.version))
        choice = {
            "token_ids": tokens,
            "logprobs": {"content": [{"logprob": -t / 100} for t in tokens]},
            "finish_reason": "abort" if stopped.is_set() else "length",
            "weight_versions": versions,
        }
        return web.json_response({"choices": [choice]})

    async def rest(self, request: Any) -> Any:
        from aiohttp import web

        body = json.loads(await request.read() or b"null")
        if self.deaf:
            await asyncio.sleep(3600)
        match request.path:
            case "/version":
                answer: Any = {"version": self.answered}
            case "/server_info":
                if not self.dev:
                    return web.Response(status=404)
                answer = {
                    "vllm_config": {
                        "model_config": {
                            "logprobs_mode": "processed_logprobs", "generation_config": "vllm", "max_model_len": 64
                        },
                        "cache_config": {"block_size": 32, "enable_prefix_caching": True},
                        "scheduler_config": {"async_scheduling": False},
                        "parallel_config": {"worker_extension_cls": "hybridflow.rollout.vllm.worker.WeightTaker"},
                        "lora_config": None,
                    }
                }  # fmt: skip
            case "/weight_info":
                answer = {"weight_version": self.version}
            case "/update_weight_version":
                self.version, answer = body["new_version"], {}
            case "/collective_rpc":
                answer = {"results": ["this-host"]}
                if body["method"] == "take_weights":
                    answer = {"results": [{"version": body["args"][2], "received": {"w": 7}, "num_bytes": 4}]}
            case "/pause":
                self.running.clear()
                answer = {}
            case "/resume":
                self.running.set()
                answer = {}
            case "/abort_requests":
                for name in body["request_ids"]:
                    if name in self.aborted:
                        self.aborted[name].set()
                answer = {}
            case "/reset_prefix_cache":
                answer = {"success": True}
            case "/behave":
                vars(self).update(body)
                answer = {}
            case "/served":
                answer = self.served
            case _:
                answer = {}
        return web.json_response(answer)


def serve(port: int, behaviour: dict[str, Any]) -> None:
    """Runs the server."""
    from aiohttp import web

    async def app() -> web.Application:
        peer = Peer()
        vars(peer).update(behaviour)
        made = web.Application()
        made.router.add_post("/inference/v1/generate", peer.generate)
        made.router.add_route("*", "/{path:.*}", peer.rest)
        return made

    web.run_app(app(), host="127.0.0.1", port=port, print=None, access_log=None)


# --- for tests ---


def interpreter(folder: Path, **behaviour: Any) -> str:
    """A program to give as ``python``: what it starts is this server, whatever it is asked to run.

    Args:
        folder: where to write it.
        behaviour: of the servers; "exit": says something and ends at once instead.
    """
    path = folder / "python"
    say = behaviour.pop("exit", None)
    run = f"exec {sys.executable} {__file__} '{json.dumps(behaviour)}' \"$@\""
    if say is not None:
        run = f"echo '{say}'; exit 3"
    path.write_text(f'#!/bin/sh\ncase "$1" in -c) echo {VERSION};; *) {run};; esac\n')
    path.chmod(0o755)
    return str(path)


def start_peer(port: int, **behaviour: Any) -> subprocess.Popen[bytes]:
    """A server that somebody else has started; returns when it answers."""
    process = subprocess.Popen([sys.executable, __file__, json.dumps(behaviour), "--port", str(port)])
    while process.poll() is None:
        try:
            ask(f"http://127.0.0.1:{port}", "/health")
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    return process


def ask(url: str, path: str, body: Any = None) -> Any:
    """What a server answers to a POST."""
    data = json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, data, method="POST")) as answer:
        return json.loads(answer.read())


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(int(sys.argv[sys.argv.index("--port") + 1]), json.loads(sys.argv[1]))
    os._exit(0)
