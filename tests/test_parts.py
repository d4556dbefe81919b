"""What CI runs is whole: its parts are those of the Makefile, and no test that meets transformers is forgotten."""

from __future__ import annotations

import re
from pathlib import Path

from oldest import AGAIN, ONCE

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("chat", "data", "engines", "models", "rollout", "weights")  # whole runs are made of what these rooms show
MEETS = re.compile(
    r"^\s*(from|import) (transformers|peft|tiny|hybridflow\.(chat|engines|models|rollout\.inline))\b", re.M
)


def test_ci_runs_every_part() -> None:
    (parts,) = re.findall(r"^for part in (.*); do$", (ROOT / ".ci/run").read_text(), re.M)
    (others,) = re.findall(r"^test-all: (.*?)  ##", (ROOT / "Makefile").read_text(), re.M)
    assert parts.split() == ["environments", "check", "docs", "wheel", "test", *others.split()]


def test_every_test_that_meets_transformers_runs_with_the_oldest_or_says_why_not() -> None:
    files = [path for room in ROOMS for path in (ROOT / "tests" / room).glob("test_*.py")]
    assert not AGAIN.keys() & ONCE.keys()
    meeting = {path.relative_to(ROOT).as_posix() for path in files if MEETS.search(path.read_text())}
    assert meeting == AGAIN.keys() | ONCE.keys()
