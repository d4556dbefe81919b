"""Replicas of a generation engine in the processes of a pool, as one engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from hybridflow.balance import balanced_ranks
from hybridflow.controller.group import Future, WorkerGroup
from hybridflow.placing.group_engine import RemoteStream
from hybridflow.protocols.generation import Request, Result
from hybridflow.protocols.waiting import never
from hybridflow.protocols.weights import Receipt, WeightStream
from hybridflow.weights.readback import together

SLICE_SECONDS = 0.1  # seconds that replicas generate before they return what has ended, and take new requests


class GroupRollout:
    """A `RolloutEngine` over replicas in a pool: each generates for its share of the prompts.

    Replicas generate for a moment, return what has ended, and continue while the controller scores it. The requests
    alone decide which replica gets a prompt, so tokens, and the batches that they were computed in, repeat. A request
    may name its replica.

    Args:
        group: `placing.rollout_worker.RolloutWorker`.
    """

    same_memory = False  # what workers take is verified, also where they share it with an actor

    def __init__(self, group: WorkerGroup) -> None:
        self.group = group
        self.should_return: Callable[[], bool] = never
        self.on_restart: Callable[[], object] | None = None
        self.version = 0
        self.replicas = group.world_size
        lengths, blocks = zip(*self.group.sizes())
        self.max_model_len, self.cache_block = min(lengths), max(blocks)
        self._next = 0
        self._queue: list[tuple[int, Request]] = []
        self._in_flight: set[int] = set()
        self._slice: Future | None = None  # in flight in the replicas
        self._ready: list[Result] = []
        self._interrupted = threading.Event()

    def submit(self, request: Request) -> int:
        """See `RolloutEngine.submit`."""
        self._next += 1
        self._queue.append((self._next, request))
        self._in_flight.add(self._next)
        return self._next

    def wait(self) -> list[Result]:
        """See `RolloutEngine.wait`."""
        while not self._ready and self._in_flight and not self._interrupted.is_set() and not self.should_return():
            self._advance()
        interrupted = self._interrupted.is_set()
        self._interrupted.clear()
        return self._take(begin=not interrupted)  # after an interrupt come requests, for the next slice

    def interrupt(self) -> None:
        """See `RolloutEngine.interrupt`; checked when replicas return, every tenth of a second."""
        self._interrupted.set()

    def poll(self) -> list[Result]:
        """See `RolloutEngine.poll`; replicas continue with what was submitted."""
        if self._slice is not None and self._slice.done():
            self._finish()
        return self._take(begin=True)

    def _take(self, *, begin: bool) -> list[Result]:
        ready, self._ready = self._ready, []
        if self._in_flight and self._slice is None and begin:
            self._begin()
        return ready

    def abort(self, handles: Iterable[int]) -> list[Result]:
        """See `RolloutEngine.abort`."""
        if self._slice is not None:
            self._finish()
        wanted = set(handles)
        never = [h for h, _ in self._queue if h in wanted]
        self._queue = [(h, r) for h, r in self._queue if h not in wanted]
        done = _placed(self.group.abort(sorted(wanted)))
        done += [result for result in self._ready if result.handle in wanted]
        self._ready = [result for result in self._ready if result.handle not in wanted]
        self._in_flight -= wanted
        return done + [Result(h, [], [], "abort", []) for h in never]

    def pause(self) -> None:
        """See `RolloutEngine.pause`."""
        self._settle()
        self.group.pause()

    def resume(self) -> None:
        """See `RolloutEngine.resume`."""
        self.group.resume()

    def update_weights(self, stream: WeightStream, version: int) -> list[Receipt]:
        """See `RolloutEngine.update_weights`: the receipts of every replica's processes, replica by replica."""
        assert isinstance(stream, RemoteStream) and stream.engine is not None, "replicas take weights from workers"
        self._settle()
        self.version = version
        actor = stream.engine.group
        if actor.pool == self.group.pool:
            answers = self.group.take_weights(actor.name, version, stream.lora)
            stream.published.update(answers[0][1])
            return _flat(receipts for receipts, _ in answers)
        return stream.engine.send_weights(
            stream, self.group.host(), lambda address: _flat(self.group.receive_weights(address, version))
        )

    def receivers(self) -> list[str]:
        """See `RolloutEngine.receivers`: replicas take weights as `update_weights` finds best."""
        return []

    def receive_weights(self, address: str, version: int) -> list[Receipt]:
        """Raises an AssertionError: it is never called, because there are no `receivers`."""
        raise AssertionError("replicas take weights through update_weights")

    def read_back(self, names: Sequence[str]) -> dict[str, int]:
        """See `RolloutEngine.read_back`: of all replicas."""
        self._settle()
        return together(self.group.read_back(list(names)), "replicas")

    def forget(self) -> None:
        """See `RolloutEngine.forget`."""
        self._settle()
        self.group.forget()

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        assert not self._in_flight, "sleep with requests in flight"
        self.group.sleep()

    def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        self.group.wake()

    def close(self) -> None:
        """See `RolloutEngine.close`: the processes end with their cluster."""

    def _advance(self) -> None:
        if self._slice is None:
            self._begin()
        self._finish()

    def _begin(self) -> None:
        shares = shares_of(self._queue, self.group.world_size)
        self._queue = []
        self._slice = self.group.advance.later(shares, [SLICE_SECONDS] * len(shares))

    def _finish(self) -> None:
        assert self._slice is not None
        under_way, self._slice = self._slice, None
        for result in _placed(under_way.result()):
            self._in_flight.discard(result.handle)
            self._ready.append(result)

    def _settle(self) -> None:
        """Waits for the round of generation that is in flight, if any: commands reach replicas in order."""
        if self._slice is not None:
            self._finish()


def shares_of(queue: Sequence[tuple[int, Request]], replicas: int) -> list[list[tuple[int, Request]]]:
    """Deals requests to replicas: those of one prompt together, and as far as known beforehand equally many tokens to
    each.
    """
    prompts: dict[tuple[int, ...], list[tuple[int, Request]]] = {}
    for handle, request in queue:
        if request.replica is None:
            prompts.setdefault(request.prompt_ids, []).append((handle, request))
    costs = [
        len(prompt) + sum(r.sampling.max_tokens - len(r.generated_ids) for _, r in asked)
        for prompt, asked in prompts.items()
    ]
    together = list(prompts.values())
    shares = [[entry for i in rows for entry in together[i]] for rows in balanced_ranks(costs, replicas)]
    for handle, request in queue:
        if request.replica is not None:
            shares[request.replica].append((handle, request))
    return shares


def _placed(replicas: Sequence[list[Result]]) -> list[Result]:
    """Returns the results of all replicas, each with the number of its own."""
    for number, results in enumerate(replicas):
        for result in results:
            result.replica = number
    return [result for results in replicas for result in results]


def _flat(replicas: Iterable[list[Receipt]]) -> list[Receipt]:
    return [receipt for receipts in replicas for receipt in receipts]
