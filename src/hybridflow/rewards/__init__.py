"""What an answer is worth. Built-in rewards are in the table `REWARDS`."""

from collections.abc import Callable
from typing import Any

from hybridflow.rewards import gsm8k

REWARDS: dict[str, Callable[..., Any]] = {"gsm8k": gsm8k.strict, "gsm8k_flexible": gsm8k.flexible}
