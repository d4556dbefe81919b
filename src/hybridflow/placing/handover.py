"""Whose turn it is on devices that generation and training share: one has the memory, the other rests.

    generation, evaluation   models rest (what ``engine.offload`` names goes to host memory), then the engine wakes
    training, saving         the engine sleeps; a model comes back with its first call
    publication              the engine wakes; models stay, for they send

Nothing may be in flight when the engine falls asleep. Where nothing is shared (``rollout.sleep``), nothing is done.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybridflow.protocols.generation import RolloutEngine
from hybridflow.protocols.training import Scorer


class HandOver:
    """Puts an engine to sleep and wakes it, as the phases of a run need.

    Args:
        rollout: awake.
        models: what is trained or scores, and may rest while answers are generated.
        sleeps: whether they share devices.
    """

    def __init__(self, rollout: RolloutEngine, models: Sequence[Scorer], *, sleeps: bool) -> None:
        self.rollout, self.sleeps, self.awake = rollout, sleeps, True
        self.models = list(models)

    def to_generation(self) -> None:
        """Answers are generated next."""
        if self.sleeps:
            for model in self.models:
                model.rest()
            self.to_publication()

    def to_publication(self) -> None:
        """Weights are published next."""
        if not self.awake:
            self.rollout.wake()
            self.awake = True

    def to_training(self) -> None:
        """Models score, learn, or are saved next."""
        if self.sleeps and self.awake:
            self.rollout.sleep()
            self.awake = False

    def close(self) -> None:
        """Ends the engine: it holds no memory any more."""
        self.rollout.close()
        self.sleeps = False
