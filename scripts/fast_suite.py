"""The fast tests under this processor's instructions and under those of older ones: what fails, and how long it takes.

    python scripts/fast_suite.py benchmarks/results/fast_suite.json native avx2 sse
    python scripts/fast_suite.py benchmarks/results/fast_suite.json native --threads 2 --jobs 1

A bound that rests on one processor's kernels holds on that processor alone. PyTorch, oneDNN and MKL can be limited to
no more than another processor has: other vectors, other blocks of a product, another order of sums. Readings of other
instructions, threads or jobs that the file holds already are kept. Ends with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from measuring import record  # noqa: E402

FAST = "not slow and not vllm and not sglang and not gpu"
INSTRUCTIONS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "sse": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}


def run(instructions: str, threads: int, jobs: int, tests: list[str]) -> dict[str, Any]:
    """Runs the tests once; the middle of pytest's output goes to the screen."""
    single = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-m", FAST, "--durations=20", "-p", "no:cacheprovider", *tests]
    if jobs > 1:
        command += ["-n", str(jobs), "--dist", "worksteal"]
    settings = INSTRUCTIONS[instructions] | single
    print(shlex.join([f"{name}={value}" for name, value in settings.items()] + command), flush=True)
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            said += line
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "instructions": instructions,
        "threads": threads,
        "jobs": jobs,
        "status": process.returncode,
        "counts": {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", said)},
        "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE),
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "slowest": re.findall(r"^ *([\d.]+s \w+ +\S+)", said, re.MULTILINE),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", type=Path, help="JSON file to write, or to add to")
    parser.add_argument("instructions", nargs="+", choices=INSTRUCTIONS, help="instruction sets, one after the other")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in every process")
    parser.add_argument("--jobs", type=int, default=2, help="processes that share the tests")
    parser.add_argument("--tests", nargs="*", default=[], help="files or folders instead of all tests")
    given = parser.parse_args()
    readings: list[dict[str, Any]] = json.loads(given.target.read_text())["results"] if given.target.exists() else []
    failed = False
    for instructions in given.instructions:
        reading = run(instructions, given.threads, given.jobs, given.tests)
        failed |= reading["status"] != 0
        same = instructions, given.threads, given.jobs
        readings = [r for r in readings if (r["instructions"], r["threads"], r["jobs"]) != same] + [reading]
        command = shlex.join(["python", "scripts/fast_suite.py", *sys.argv[1:]])
        found = record(command, {"tests": FAST, "instructions": INSTRUCTIONS}, readings)
        found["machine"].pop("threads")
        given.target.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
