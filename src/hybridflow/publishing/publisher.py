"""Publication of weights: it verifies that the engine samples from what was trained, and reports what is wrong where it
does not.

- *Receipts*, every time: the fingerprint of each tensor as it left is compared with those that every process of the
  engine took of what arrived; so are names and the version.
- *A canary*, every time (`canary.py`): the engine responds to a prompt that it has seen under the weights before. It
  shows what no receipt can: weights that arrived and are not computed with, a cache of old weights that was kept.
- *A drill*, at the first publication of a process: every tensor is changed (`weights.drill`) and published, then the
  true weights are. Any tensor that the engine does not take shows, because the trainer computes with another one.
- *Read-back*, once in a while, of engines that can report what lies in their memory now.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.placing.role import Role
from hybridflow.protocols.generation import Result, RolloutEngine
from hybridflow.protocols.training import TrainEngine
from hybridflow.protocols.weights import Receipt, WeightStream
from hybridflow.publishing.canary import Canary, CanaryAnswer, Gap, ordinary_tokens
from hybridflow.weights.stream import WeightSyncError, verify

PROMPTS = 4  # of the drill: enough tokens that rarely used experts are among them
BLAMED = 4  # most tensors that are searched for when the drill fails
DRILL = "the start-up drill's, in which every tensor is changed"


@dataclass
class Publisher:
    """Publishes a trainer's weights to a generation engine and verifies that it samples from them.

    Args:
        canary: of the trainer and the engine.
        stream: makes the stream of the trainer's weights, as the engine takes them: called with whether weights that
            are not trained must be in it.
        read_back_every: ``rollout.read_back_every``.
        note: called with (kind, text) of what was found at the start.
    """

    canary: Canary
    stream: Callable[[bool], WeightStream]
    read_back_every: int = 0
    note: Callable[[str, str], object] = lambda kind, text: None
    count: int = field(default=0, init=False)  # publications
    _published: dict[str, int] = field(default_factory=dict, init=False)  # what the engine should hold
    _elsewhere: set[str] = field(default_factory=set, init=False)  # tensors that it keeps in another form

    def publish(self, version: int) -> dict[str, float]:
        """Publishes the trainer's weights; returns metrics.

        Raises:
            WeightSyncError: the engine has other weights, or computes with others.
        """
        if self.canary.rollout.same_memory:  # nothing travels
            self.send(version)
            return {}
        if self.count:
            if self.canary.rollout.cache_block:
                self.canary.ask(version, tokens=1)  # now its prompt is in the cache, under the weights before
            measured = self._sync(version)
        else:
            measured = self._drill(version)
        self.count += 1
        return measured

    def _drill(self, version: int) -> dict[str, float]:
        """Runs the drill, and publishes the true weights."""
        trainer, canary = self.canary.trainer, self.canary
        trainer.perturb()
        try:
            self.send(version)
            answers = canary.ask(version, range(PROMPTS))
            drilled = canary.gap(answers)
            self._require(drilled, version, answers, DRILL)
        finally:
            trainer.perturb()  # as they were, bit for bit
        measured = self._sync(version)
        if not canary.near(drilled):  # by what the true weights' gap allows
            trainer.perturb()
            try:
                self._require(drilled, version, answers, DRILL)
            finally:
                trainer.perturb()
        self.note(
            "weights",
            f"start-up drill: {len(self._published)} tensors changed and computed with; log-probabilities differ from "
            f"the trainer's by up to {drilled.largest:.1e}, under the true weights by "
            f"{measured['rollout_sync/canary_max_diff']:.1e}",
        )
        return measured

    def _sync(self, version: int) -> dict[str, float]:
        """Sends the weights and verifies them."""
        began = time.perf_counter()
        num_bytes = self.send(version, whole=not self.count)
        delivered = time.perf_counter()
        answers = self.canary.ask(version)
        gap = self.canary.gap(answers)
        self._require(gap, version, answers, "the trainer's")
        measured = {
            "rollout_sync/bytes": float(num_bytes),
            "rollout_sync/canary_max_diff": gap.largest,
            "rollout_sync/canary_mean_diff": gap.mean,
            "timing_s/rollout_sync": delivered - began,
            "timing_s/rollout_sync_canary": time.perf_counter() - delivered,
        }
        if not self.count:
            self.canary.settle(gap)
        if self.read_back_every and self.count % self.read_back_every == 0:
            measured |= self._read_back(version)
        return measured

    def send(self, version: int, *, whole: bool = True) -> int:
        """Sends the weights and compares the receipts with them; returns the bytes that all processes received.

        Args:
            version: of the weights.
            whole: whether the engine needs the weights beside adapters too.
        """
        stream = self.stream(whole)
        receipts = deliver(stream, self.canary.rollout, version)
        verify(stream, receipts, version)
        self._published |= stream.published
        return sum(receipt.num_bytes for receipt in receipts)

    def _read_back(self, version: int) -> dict[str, float]:
        """Compares the engine's memory with what was published."""
        held, differing = self.held()
        if not self.count:  # the drill has shown that the engine computes with these: they are kept in another form
            self._elsewhere |= {*differing}
        elif differing:
            raise WeightSyncError(
                f"the generation engine's memory, read back at version {version}, holds other values than were "
                f"published of {len(differing)} tensors: {', '.join(differing[:5])}"
            )
        return {"rollout_sync/read_back_tensors": float(held)} if held else {}

    def held(self) -> tuple[int, list[str]]:
        """Returns how many tensors the engine can read back, and which of them are not what was published."""
        held = self.canary.rollout.read_back(sorted(self._published.keys() - self._elsewhere))
        return len(held), sorted(name for name, value in held.items() if value != self._published[name])

    # --- what is wrong ---

    def _require(self, gap: Gap, version: int, answers: list[CanaryAnswer], whose: str) -> None:
        canary = self.canary
        if canary.near(gap):
            return
        raise WeightSyncError(
            f"with weights of version {version} the generation engine's log-probabilities are not {whose}: they differ "
            f"by {gap.largest:.2g} {gap.where}, by {gap.mean:.2g} on average; allowed is {canary.limit:.2g} "
            f"{'at most' if canary.exact else 'on average'}. {self._blame(version, answers)}"
        )

    def _blame(self, version: int, answers: list[CanaryAnswer]) -> str:
        """Describes what explains the gap."""
        if self.canary.near(self.canary.gap(self.canary.ask(version, [PROMPTS]))):
            return (
                "A prompt that it has not seen before gets the right ones: its prefix cache holds keys and values of "
                "older weights"
            )
        unchanged = self._unchanged(answers) if not self.count else []
        if unchanged:
            return f"It computes as if it had not taken {', '.join(unchanged)}"
        differing = self.held()[1]
        if differing:
            return f"Its memory holds other values than were published: {', '.join(differing[:5])}"
        return (
            "Everything arrived as it was published: it computes with other copies of weights (old ones, or packed for "
            "kernels and not packed again), or not the model that the trainer computes"
        )

    def _unchanged(self, answers: list[CanaryAnswer]) -> list[str]:
        """Returns the tensors whose change explains the gap: with them changed back, the trainer computes what the
        engine did.

        It finds one after the other, each time the one that explains most; every candidate costs one scoring of the
        responses.
        """
        canary, found = self.canary, list[str]()
        try:
            while len(found) < BLAMED:
                gaps = {name: self._without(name, answers) for name in sorted(self._published.keys() - {*found})}
                best = min(gaps, key=lambda name: gaps[name].mean)
                canary.trainer.perturb([best])
                found.append(best)
                if canary.near(gaps[best]):
                    return found
            return []
        finally:
            canary.trainer.perturb(found)

    def _without(self, name: str, answers: list[CanaryAnswer]) -> Gap:
        self.canary.trainer.perturb([name])
        try:
            return self.canary.gap(answers)
        finally:
            self.canary.trainer.perturb([name])


def deliver(stream: WeightStream, engine: RolloutEngine, version: int) -> list[Receipt]:
    """Gives an engine new weights: straight from where they are to its own processes, or through this one.

    Returns:
        A receipt of every process that took them; none is compared with the stream yet.
    """
    receivers = engine.receivers() if stream.send is not None else []
    if stream.send is None or not receivers:
        return engine.update_weights(stream, version)
    return stream.send(receivers, lambda address: engine.receive_weights(address, version))


def publisher_of(
    role: Role,
    trainer: TrainEngine,
    rollout: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    *,
    exact: bool,
    read_back_every: int,
    keep: Callable[[Sequence[Result]], None],
    note: Callable[[str, str], object],
) -> Publisher:
    """Makes the publisher of a run.

    Args:
        role: the actor's.
        trainer: the engine that trains.
        rollout: the engine.
        tokenizer: of the model.
        exact: see `Canary`.
        read_back_every: see `Publisher`.
        keep: see `Canary`.
        note: see `Publisher`.
    """
    assert role.longest is not None
    canary = Canary(
        trainer=trainer,
        rollout=rollout,
        tokens=ordinary_tokens(tokenizer),
        room=rollout.max_model_len if rollout.cache_block else role.longest,  # prompts fill blocks of a cache
        seed=role.seed,
        exact=exact,
        keep=keep,
    )
    publishes = role.publish if role.model.lora is not None and not rollout.same_memory else None

    def stream(whole: bool) -> WeightStream:
        return trainer.stream_weights(lora=None if whole and publishes == "adapters" else publishes)

    return Publisher(canary, stream, read_back_every, note)
