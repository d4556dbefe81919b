"""The data sets that `hybridflow prepare` knows."""

from __future__ import annotations

from hybridflow.data.prepare.aime24 import AIME24
from hybridflow.data.prepare.carry import CARRY
from hybridflow.data.prepare.countdown import COUNTDOWN
from hybridflow.data.prepare.full_hh_rlhf import FULL_HH_RLHF
from hybridflow.data.prepare.geo3k import GEO3K
from hybridflow.data.prepare.gsm8k import GSM8K
from hybridflow.data.prepare.hellaswag import HELLASWAG
from hybridflow.data.prepare.math import MATH
from hybridflow.data.prepare.schema import Generated, Published
from hybridflow.data.prepare.svamp import SVAMP

SETS: dict[str, Published | Generated] = {
    "aime24": AIME24,
    "carry": CARRY,
    "countdown": COUNTDOWN,
    "full-hh-rlhf": FULL_HH_RLHF,
    "geo3k": GEO3K,
    "gsm8k": GSM8K,
    "hellaswag": HELLASWAG,
    "math": MATH,
    "svamp": SVAMP,
}
