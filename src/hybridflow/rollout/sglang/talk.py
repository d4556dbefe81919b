"""The requests to SGLang, over any connection: generation, pauses, weights.

This file handles what SGLang does by default and a trainer must not be exposed to:

- A request that ignores the model's end-of-sequence token ignores its own stop tokens too. So one with stop tokens
  ignores nothing, and is continued where something else ended it: `Piece` with reason "abort".
- A request that gets not-a-number ends with a stop token in its place, as if all were well. That is an error here.
- The id of a request is compared by its beginning when requests are aborted: ids are of one length.
- Noise is ours (`sglang/sampler.py`), and so are the filters; where they cut, SGLang returns which tokens could have
  been drawn and log-probabilities among these, otherwise log-probabilities after temperature.
- Its repetition penalty counts the response alone; requests with one are refused.
- New weights need an open session and an empty cache, which needs all requests back in the queue (mode "retract");
  they are read again under the new weights. A plain pause leaves them where they are (mode "in_place").
- Weight calls wait for all requests to end unless generation is paused: it always is.
"""

from __future__ import annotations

import asyncio
import json
import socket
import uuid
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hybridflow.errors import UserError
from hybridflow.protocols.generation import Request
from hybridflow.protocols.weights import Receipt
from hybridflow.rollout.job import Job
from hybridflow.rollout.sampling import check_sampling
from hybridflow.rollout.served.engine import AsyncEngine
from hybridflow.rollout.served.http import Owner
from hybridflow.rollout.served.replica import Piece, Replica, ReplicaFailed
from hybridflow.rollout.sglang.sampler import seed_of
from hybridflow.rollout.sglang.worker import LOADER, order
from hybridflow.weights.readback import together
from hybridflow.weights.stream import WeightSyncError

ANSWER_TIMEOUT = timedelta(seconds=30)  # the reply to an order has arrived when the call returns
LIMITS = {"stop": 32, "stop_regex": 256}  # texts, bytes: SGLang refuses more


@dataclass(slots=True)
class Known:
    """What an engine reported about itself.

    Args:
        processes: how many take weights.
        vocabulary: how many words the model has.
        has_tokenizer: whether it can look for texts that end a response.
        page: tokens of a block of its prefix cache.
    """

    processes: int = 1
    vocabulary: int = 0
    has_tokenizer: bool = False
    page: int = 0


@dataclass(slots=True)
class Line:
    """What is kept for a replica.

    Args:
        hosts: of its processes.
        known: what it reported about itself.
        ids: what requests that are with it are called there, by handle.
    """

    hosts: list[str] = field(default_factory=list)
    known: Known = field(default_factory=Known)
    ids: dict[int, str] = field(default_factory=dict)


class SglangTalk(AsyncEngine):
    """The part of an `AsyncEngine` that knows what SGLang understands.

    A subclass gives `_call`, and calls `_set_up` before `open`, and `_look` when a replica answers.
    """

    @abstractmethod
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
        """Returns what SGLang answers at a path of its HTTP interface; see `ServerEngine`."""

    def _set_up(self, owner: Owner, *, one_host: bool) -> None:
        """Sets up what a call to SGLang needs.

        Args:
            owner: how the run marks weight versions.
            one_host: whether all replicas are on this host.
        """
        self._owner = owner
        self._lines = {replica.name: Line() for replica in self._live}
        self._store: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=ANSWER_TIMEOUT)
        self._reply = f"{'127.0.0.1' if one_host else socket.gethostname()}:{self._store.port}"

    @property
    def vocabulary(self) -> int:
        """How many words the model has."""
        return next(iter(self._lines.values())).known.vocabulary

    @property
    def cache_block(self) -> int:
        """Tokens of a block of the prefix cache."""
        return max(line.known.page for line in self._lines.values())

    # --- requests ---

    def _check(self, request: Request) -> None:
        sampling = request.sampling
        check_sampling(sampling, self.vocabulary)
        if sampling.repetition_penalty != 1:
            raise UserError(
                "the SGLang engine cannot sample with a repetition penalty",
                why="SGLang penalises tokens of the response alone, other engines those of the prompt too",
                fix="leave repetition_penalty at 1, or use the inline engine or vLLM",
            )
        if request.images:
            raise UserError("the SGLang engine takes no images", fix="use rollout.engine=vllm")

    async def _generate(self, replica: Replica, job: Job) -> Piece:
        line, number = self._lines[replica.name], uuid.uuid4().hex
        line.ids[job.handle] = number
        try:
            answer = await self._call(replica, "/generate", self._body(line, number, job), answers=True)
        finally:
            line.ids.pop(job.handle, None)
        return self._piece(job, answer)

    def _body(self, line: Line, number: str, job: Job) -> dict[str, Any]:
        sampling = job.request.sampling
        sampled: dict[str, Any] = {
            "max_new_tokens": job.left(),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "logit_bias": {str(token): value for token, value in sampling.logit_bias} or None,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": not sampling.stop_token_ids,
            "sampling_seed": seed_of(job.request),
            "skip_special_tokens": False,
            "no_stop_trim": True,
        }
        if job.cuts:  # supports are returned where top-k is limited
            sampled["top_k"] = min(sampling.top_k or self.vocabulary, self.vocabulary)
        if line.known.has_tokenizer:
            sampled["stop"] = list(sampling.stop)[: LIMITS["stop"]] or None
            regex = sampling.stop_regex
            sampled["stop_regex"] = regex if regex and len(regex.encode()) <= LIMITS["stop_regex"] else None
        return {
            "rid": number,
            "input_ids": list(job.context()),
            "sampling_params": sampled,
            "return_logprob": True,
            "logprob_start_len": -1,
            "return_sampling_mask": job.cuts,
        }

    def _piece(self, job: Job, answer: Mapping[str, Any]) -> Piece:
        meta, tokens = answer["meta_info"], list(answer["output_ids"])
        ended = meta["finish_reason"]
        if ended.get("matched") == "NaN happened":
            raise UserError(
                "the model in SGLang gives not-a-number",
                why="no token can be drawn from that",
                fix="look at the last updates' gradient norms and learning rate; on GPUs also at rollout dtype",
            )
        if ended["type"] == "abort" and (ended.get("status_code") or 0) >= 500:
            raise ReplicaFailed(f"a request ended with {ended['status_code']}: {ended['message']}")
        supports = None
        if job.cuts:
            logps = meta.get("output_token_sampling_logprobs") or []
            masks = meta.get("output_token_sampling_mask") or []
            supports = [sorted(ids) if len(ids) < self.vocabulary else [] for ids in masks]
        else:
            logps = [value for value, _, _ in meta.get("output_token_logprobs") or []]
        known = min(len(tokens), len(logps))  # the last token of an aborted request may arrive without the rest
        assert known == len(tokens) or ended["type"] == "abort", f"{len(tokens)} tokens with {len(logps)} log-probs"
        tokens, logps = tokens[:known], logps[:known]
        reason = "abort"
        if tokens and tokens[-1] in job.request.sampling.stop_token_ids:
            reason = "stop"
        elif len(tokens) == job.left():
            reason = "length"
        told = meta.get("weight_versions") or []
        spans = [(self._owner.version(span["version"]), span["start"]) for span in told if span["start"] < known]
        return Piece(tokens, logps, reason, spans, None if supports is None else supports[:known])  # type: ignore[arg-type]

    async def _abort(self, replica: Replica, jobs: list[Job]) -> None:
        line = self._lines[replica.name]
        ids = [line.ids[job.handle] for job in jobs if job.handle in line.ids]
        await asyncio.gather(*(self._call(replica, "/abort_request", {"rid": number}) for number in ids))
        if self._running.is_set():
            return
        # An abort of a paused request takes effect in its next step: SGLang runs that step, and is paused again.
        out = [f.task for f in replica.flights if f.out and f.job in jobs and f.task is not None]
        await self._call(replica, "/continue_generation", {"torch_empty_cache": False})
        if out:
            await asyncio.wait(out, timeout=self.supervision.answer_timeout)
        await self._pause(replica)

    async def _pause(self, replica: Replica) -> None:
        await self._call(replica, "/pause_generation", {"mode": "in_place"})

    async def _resume(self, replica: Replica) -> None:
        await self._call(replica, "/continue_generation", {"torch_empty_cache": False})

    # --- weights ---

    async def _look(self, replica: Replica, info: Mapping[str, Any]) -> None:
        """Claims a replica that answers for this run: with our noise, and version 0.

        Args:
            replica: it.
            info: what it reports at "/server_info".
        """
        line = self._lines[replica.name] = Line()
        line.known = Known(
            processes=int(info["tp_size"]),
            has_tokenizer=not info["skip_tokenizer_init"],
            page=int(info["page_size"] or 1) if not info["disable_radix_cache"] else 0,
        )
        answers = await self._order(replica, {"do": "look"}, version=self._owner.mark(0))
        line.hosts = [str(answer["host"]) for answer in answers]
        line.known.vocabulary = int(answers[0]["vocabulary"])

    def _hosts(self, replica: Replica) -> list[str]:
        return list(self._lines[replica.name].hosts)

    async def _take_weights(self, replica: Replica, address: str, first: int, version: int) -> list[Receipt]:
        what = {"do": "take", "address": address, "first": first, "version": version}
        answers = await self._order(replica, what, version=self._owner.mark(version))
        return [Receipt(a["version"], a["received"], a["num_bytes"]) for a in answers]

    def read_back(self, names: Sequence[str]) -> dict[str, int]:
        """See `RolloutEngine.read_back`: what a scheduler holds whole."""
        return self._do(self._read_back(list(names)))

    async def _read_back(self, names: list[str]) -> dict[str, int]:
        what = {"do": "read_back", "names": names}
        answers = [a for replica in self._live for a in await self._order(replica, what, version=None)]
        return together((answer["held"] for answer in answers), "processes of SGLang")

    async def _order(self, replica: Replica, what: Mapping[str, Any], *, version: str | None) -> list[dict[str, Any]]:
        """Sends an order to every process of a replica (see `sglang/worker.py`); returns their replies, by rank.

        Args:
            replica: which.
            what: the order.
            version: of the weights that it brings; None where it brings none, which leaves caches alone.
        """
        known, number = self._lines[replica.name].known, uuid.uuid4().hex
        mode = "in_place" if version is None else "retract"
        await self._call(replica, "/pause_generation", {"mode": mode})
        try:
            await self._call(replica, "/begin_weight_update", {"selector": "target"})
            try:
                body = {
                    "serialized_named_tensors": [order(number, self._reply, what)] * known.processes,
                    "load_format": LOADER,
                    "flush_cache": version is not None,
                    "weight_version": version,
                    "selector": "target",
                }
                await self._call(replica, "/update_weights_from_tensor", body)
            finally:
                await self._call(replica, "/end_weight_update", {})
        finally:
            if self._running.is_set():
                await self._resume(replica)
        answers = [self._answer(number, rank) for rank in range(known.processes)]
        said = [f"process {rank} of {replica.name}: {a['error']}" for rank, a in enumerate(answers) if "error" in a]
        if said:
            raise WeightSyncError("; ".join(said))
        return answers

    def _answer(self, number: str, rank: int) -> dict[str, Any]:
        key = f"answer/{number}/{rank}"
        if not self._store.check([key]):
            return {"error": "it failed: the log of the server gives the reason"}
        answer: dict[str, Any] = json.loads(self._store.get(key))
        self._store.delete_key(key)
        return answer

    # --- memory and life ---

    async def _ping(self, replica: Replica) -> None:
        await self._call(replica, "/server_info", method="GET")

    async def _sleep(self, replica: Replica) -> None:
        await self._call(replica, "/release_memory_occupation", {})

    async def _wake(self, replica: Replica) -> None:
        await self._call(replica, "/resume_memory_occupation", {})
