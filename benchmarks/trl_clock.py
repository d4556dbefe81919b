"""The clock of the peers that run TRL's trainers; imported in an environment that has TRL."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from grpo_step import Meter


class Clock(TrainerCallback):
    """A step lasts from the end of the one before it to its own end."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.phase = {"generation": 0.0, "reward": 0.0}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        rest = cpu - self.cpu - sum(self.phase.values())
        self.meter.steps.append({**self.phase, "update": rest, "publish": 0.0, "other": 0.0, "wall": wall - self.wall})
        self.phase = dict.fromkeys(self.phase, 0.0)
        self.cpu, self.wall = time.process_time(), time.perf_counter()
