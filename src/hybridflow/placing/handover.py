"""Turns on devices that generation and training share: one has the memory, the other rests.

    generation, evaluation   models rest (what ``engine.offload`` names goes to host memory), then the engine wakes
    training, saving         the engine forgets earlier turns and sleeps; a model comes back with its first call
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
        models: the models that train or score, and may rest while responses are generated.
        sleeps: whether they share devices.
    """

    def __init__(self, rollout: RolloutEngine, models: Sequence[Scorer], *, sleeps: bool) -> None:
        self.rollout, self.sleeps, self.awake = rollout, sleeps, True
        self.models = list(models)

    def to_generation(self) -> None:
        """Prepares for generation."""
        self.rollout.forget()  # what is kept of an evaluation is of no use
        if self.sleeps:
            for model in self.models:
                model.rest()
            self.to_publication()

    def to_publication(self) -> None:
        """Prepares for the publication of weights."""
        if not self.awake:
            self.rollout.wake()
            self.awake = True

    def to_training(self) -> None:
        """Prepares for models that score, learn, or are saved."""
        self.rollout.forget()
        if self.sleeps and self.awake:
            self.rollout.sleep()
            self.awake = False

    def close(self) -> None:
        """Ends the engine, which then holds no memory."""
        self.rollout.close()
        self.sleeps = False
