"""Checks that revisions train the same, bit for bit: short runs at each of them, metrics and weights compared with the
base.

    python scripts/same_bits.py main                  # HEAD against main
    python scripts/same_bits.py v1 abc123 def456      # each against v1
    python scripts/same_bits.py main HEAD --each      # every commit in between against the one before it

Only what is committed is compared. The runs are commands on the revision's own recipes, on one thread: supervised
fine-tuning, GRPO and PPO from its model, a reward model, and GRPO on two processes. The results of a revision are kept
by its commit, so a base is computed once. Ends with 1 where a bit differs or a run fails, and names the first metrics
and tensors that differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEPT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hybridflow" / "same_bits"
SINGLE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ASIDE = ("timing_s/", "perf/")  # metrics that are no part of what must repeat
SHOWN = 6
# Differs between responses, however little the model has learned: every step has something to learn from.
REWARD = "def score(response, ground_truth):\n    return sum(map(ord, response)) % 101 / 101\n"

COMMON = ["run.seed=5", "run.threads=1", "run.device=cpu", "track.console=false"]
FROM_SFT = ["model.path={folder}/sft/model"]
RL = [
    *FROM_SFT,
    "reward.function={folder}/reward.py:score",
    "rollout.max_response_tokens=16",
    "eval.max_rows=16",
    "eval.every=2",
    "checkpoint.every=2",
]
GRPO = ["algorithm.kl_loss_coef=0.01", "algorithm.correction.preset=decoupled_token_is", "train.samples_per_prompt=4"]
# Name of a run, its command, and its overrides of the recipe.
RUNS: dict[str, tuple[str, list[str]]] = {
    "sft": ("sft recipes/carry/sft.yaml", ["train.steps=30", "checkpoint.every=20"]),
    "grpo": (
        "train recipes/carry/grpo.yaml",
        [*RL, *GRPO, "train.steps=4", "train.prompts_per_step=8", "train.sequences_per_update=16"]
        + ["train.epochs_per_step=2", "train.tokens_per_microbatch=400"],
    ),
    "ppo": (
        "train recipes/carry/ppo.yaml",
        [*RL, "algorithm.kl_reward_coef=0.05", "algorithm.entropy_coef=0.01"]
        + ["train.steps=3", "train.prompts_per_step=24", "train.sequences_per_update=12", "critic.warmup_steps=1"],
    ),
    "reward-model": (
        "reward-model recipes/rlhf/reward-model.yaml",
        [*FROM_SFT, "data.train={folder}/pairs.jsonl", "data.eval={folder}/pairs.jsonl", "eval.max_rows=16"]
        + ["train.epochs=null", "train.steps=6", "train.pairs_per_update=16", "eval.every=3"],
    ),
    "two processes": (
        "train recipes/carry/grpo.yaml",
        [*RL, *GRPO, "train.steps=2", "train.prompts_per_step=4", "train.sequences_per_update=8"]
        + ["placement.pools={{all: 2}}", "engine.strategy=fsdp2"],
    ),
}
# Keys by today's names, and their older names: for revisions whose page of keys lacks the new name.
RENAMED: dict[str, str] = {}

Found = dict[str, Any]
"""Of each run: its metrics (a dict per step) and a digest of each tensor, or why there are none."""


def differences(base: Found, other: Found) -> list[str]:
    """Describes what differs, in words; a run that failed always differs.

    >>> one = {"sft": {"metrics": [{"step": 1, "train/loss": 0.5}], "tensors": {"model: w": "aa"}}}
    >>> two = {"sft": {"metrics": [{"step": 1, "train/loss": 0.25}], "tensors": {"model: w": "bb"}}}
    >>> differences(one, two)
    ['sft: step 1: train/loss is 0.25, was 0.5', 'sft: model: w has other bits']
    >>> differences(one, one), differences(one, {"sft": {"failed": "no such key"}})
    ([], ['sft: could not run: no such key'])
    """
    found = []
    for name in [*base, *(n for n in other if n not in base)]:
        a, b = base.get(name, {"failed": "not run at the base"}), other.get(name, {"failed": "not run"})
        ends = [(a, " at the base"), (b, "")]
        failed = [f"{name}: could not run{where}: {run['failed']}" for run, where in ends if "failed" in run]
        found += failed or [f"{name}: {line}" for line in _differ(a, b)]
    return found


def _differ(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    lines = []
    if len(a["metrics"]) != len(b["metrics"]):
        lines.append(f"{len(b['metrics'])} lines of metrics, were {len(a['metrics'])}")
    for one, two in zip(a["metrics"], b["metrics"]):
        for key in [*one, *(k for k in two if k not in one)]:
            was, now = (json.dumps(r[key]) if key in r else "absent" for r in (one, two))  # NaN is the same as NaN
            if was != now:
                lines.append(f"step {one['step']}: {key} is {now}, was {was}")
    one, two = a["tensors"], b["tensors"]
    lines += [f"{n} is {'gone' if n in one else 'new'}" for n in sorted(one.keys() ^ two.keys())]
    return lines + [f"{n} has other bits" for n in one if n in two and one[n] != two[n]]


def digests(path: Path) -> dict[str, str]:
    """Computes a digest of type, shape and bits of each tensor in a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, about in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            bits = f"{about['dtype']} {about['shape']} ".encode() + data[start + begin : start + end]
            found[name] = hashlib.sha256(bits).hexdigest()[:16]
    return found


def result_of(folder: Path) -> dict[str, Any]:
    """Reads the results of a run: its metrics, and the tensors of its final model and of its last checkpoint."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    metrics = [{k: v for k, v in line.items() if not k.startswith(ASIDE)} for line in lines]
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    files = [*sorted(folder.glob("model/**/*.safetensors")), *sorted(last.rglob("*.safetensors"))]
    tensors = {f"{f.relative_to(folder)}: {n}": digest for f in files for n, digest in digests(f).items()}
    assert metrics and tensors, f"{folder} holds no metrics or no weights"
    return {"metrics": metrics, "tensors": tensors}


def run_all(tree: Path, folder: Path) -> Found:
    """Does the runs with the code and the recipes of a tree."""
    known = (tree / "docs/configuration.md").read_text()
    environment = os.environ | SINGLE | {"PYTHONPATH": str(tree / "src")}
    (folder / "reward.py").write_text(REWARD)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, _pairs())) + "\n")
    found: Found = {}
    for name, (command, settings) in RUNS.items():
        into = folder / name.replace(" ", "-")
        arguments = [_for(s.format(folder=folder), known) for s in [*COMMON, *settings]]
        line = [sys.executable, "-m", "hybridflow", *command.split(), f"run.folder={into}", *arguments]
        begun = time.monotonic()
        done = subprocess.run(line, cwd=tree, env=environment, capture_output=True, text=True)
        print(f"  {name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        found[name] = {"failed": done.stderr[-1500:].strip()} if done.returncode else result_of(into)
    return found


def _pairs() -> list[dict[str, str]]:
    """Makes preferences: more of the letter a."""
    rng = random.Random(0)
    rows = []
    for number in range(100):
        one, other = sorted(("".join(rng.choices("abc", k=8)) for _ in range(2)), key=lambda t: -t.count("a"))
        rows.append({"prompt": f"row {number}", "chosen": one, "rejected": other})
    return rows


def _for(setting: str, known_keys: str) -> str:
    """Returns a setting with its key as the revision spells it."""
    key, sign, value = setting.partition("=")
    return setting if f"`{key}`" in known_keys else RENAMED.get(key, key) + sign + value


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def outcome(commit: str, again: bool) -> Found:
    """Returns the results of a commit: as they are kept, or computed now."""
    settings = hashlib.sha256(json.dumps([RUNS, COMMON, REWARD, sys.version, sys.prefix]).encode()).hexdigest()[:8]
    kept = KEPT / f"{commit}-{settings}.json"
    if kept.exists() and not again:
        return json.loads(kept.read_text())
    with tempfile.TemporaryDirectory(prefix="same-bits-") as place:
        tree, folder = Path(place, "tree"), Path(place, "runs")
        tree.mkdir()
        folder.mkdir()
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "x", "-C", tree], input=archive, check=True)
        found = run_all(tree, folder)
    if not any("failed" in run for run in found.values()):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="the revision that the others are compared with")
    parser.add_argument("revisions", nargs="*", default=["HEAD"], help="what is compared; HEAD if nothing is given")
    parser.add_argument("--each", action="store_true", help="every commit from base on against the one before it")
    parser.add_argument("--again", action="store_true", help="compute what is kept from an earlier call again")
    given = parser.parse_args()
    commits = [_git("rev-parse", f"{r}^{{commit}}") for r in [given.base, *given.revisions]]
    if given.each:
        commits = [commits[0], *_git("rev-list", "--reverse", f"{commits[0]}..{commits[-1]}").split()]
    base, wrong = None, False
    for commit in commits:
        print(_git("log", "-1", "--format=%h %s", commit), flush=True)
        found = outcome(commit, given.again)
        differ = differences(found if base is None else base, found)
        wrong |= bool(differ)
        for line in differ[:SHOWN]:
            print(f"  {line}")
        if len(differ) > SHOWN:
            print(f"  and {len(differ) - SHOWN} more")
        tensors = sum(len(run.get("tensors", ())) for run in found.values())
        print(f"  {'NOT THE SAME' if differ else 'the base' if base is None else 'the same'} ({tensors} tensors)")
        base = found if base is None or given.each else base
    sys.exit(wrong)


if __name__ == "__main__":
    main()
