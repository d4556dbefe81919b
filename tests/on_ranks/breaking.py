"""What ranks do in `tests/test_ranks.py`: they break their group in the ways in which a test may."""

from __future__ import annotations

import os
import signal
import time
from typing import Literal

import torch
import torch.distributed as dist


def process_id() -> int:
    return os.getpid()


def break_on_rank_1(how: Literal["raises", "ends", "crashes", "hangs", "answers with what cannot travel"]) -> object:
    """Rank 1 does; rank 0 waits for it in a collective, as ranks do."""
    if dist.get_rank() == 1:
        if how == "raises":
            raise ValueError("rank 1 has had enough")
        if how == "ends":
            os._exit(3)
        if how == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "hangs":
            time.sleep(600)
        return lambda: None
    dist.all_reduce(torch.ones(1))
    return None


def sum_of_ranks() -> float:
    """A collective that all take part in: after a broken one it would meet what was left of it."""
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value)
    return float(value)
