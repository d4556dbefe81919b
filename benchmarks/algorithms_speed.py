"""What estimators and losses cost on one thread, here on ragged tokens and in verl on padded ones.

    python benchmarks/algorithms_speed.py --peer VERL_PYTHON        # both sides in turn, with ratios
    python benchmarks/algorithms_speed.py                           # this library alone

8,192 responses in groups of 8 with log-normal lengths of mean about 1,000, at most 8,192; no tool tokens. CPU seconds
of one call (forward, and backward for losses; to the aggregated loss and the means of its metrics), and the peak of
memory above what the process had before it, inputs among that. See benchmarks/README.md.

The environment of the peer imports this file too, for the workload: nothing at the top here needs more than torch.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measuring import record, run_alone

HERE = Path(__file__).resolve().parent
COMPONENTS = ("right", "short")
CLIPS = {"clip_low": 0.2, "clip_high": 0.28}
BOUNDS = [0.9, 1.1]
KEYS = ("cpu_s", "peak_mb")
Call = Callable[[], Any]


@dataclass(frozen=True)
class Workload:
    """The sizes of a batch of responses."""

    answers: int = 8192
    group: int = 8
    mean: int = 1000
    longest: int = 8192
    sigma: float = 0.9
    seed: int = 0

    def lengths(self) -> list[int]:
        """Returns numbers of tokens, each at least 1; one response is the longest."""
        draw, mu = random.Random(self.seed), math.log(self.mean) - self.sigma**2 / 2
        found = [min(self.longest, max(1, round(draw.lognormvariate(mu, self.sigma)))) for _ in range(self.answers)]
        found[0] = self.longest
        return found


WARMUP = Workload(answers=64, mean=20, longest=64)


def numbers(workload: Workload) -> dict[str, Tensor]:
    """Returns the same random float32 columns for both sides: of tokens ``[T]``, and of responses ``[N]``, ``[N,
    K]``.
    """
    generator = torch.Generator().manual_seed(workload.seed)
    lengths = torch.tensor(workload.lengths())
    tokens, answers = int(lengths.sum()), workload.answers

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    old_logp_T = -normal(tokens).abs().clamp_(min=0.01)
    advantage_N = normal(answers)
    return {
        "length_N": lengths,
        "reward_N": normal(answers),
        "baseline_N": normal(answers),
        "components_NK": normal(answers, len(COMPONENTS)),
        "group_N": torch.arange(answers) // workload.group,
        "old_logp_T": old_logp_T,
        "logp_T": (old_logp_T + 0.1 * normal(tokens)).clamp_(max=-1e-4),
        "ref_logp_T": old_logp_T + 0.1 * normal(tokens),
        "advantage_T": advantage_N.repeat_interleave(lengths),
        "value_T": normal(tokens),
        "sum_pi_squared_T": old_logp_T.exp().square_(),
    }


def cost(call: Call) -> dict[str, float]:
    """Returns CPU seconds of a call, and how far the memory of the process rose above what it had before, in MB
    (10^6).
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = _memory("VmRSS"), time.process_time()
    result = call()
    spent, peak = time.process_time() - began, _memory("VmHWM")
    del result
    return {"cpu_s": spent, "peak_mb": (peak - before) / 1e6}


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def run_side(calls: Callable[[Workload], dict[str, Call]], only: str | None = None) -> dict[str, dict[str, float]]:
    """Measures the cost of each call of a side, after one on a small workload."""
    torch.set_num_threads(1)
    for call in calls(WARMUP).values():
        call()
    return {name: cost(call) for name, call in calls(Workload()).items() if only in (None, name)}


# --- this library's side ---

LOSSES: dict[str, dict[str, Any]] = {
    "ppo_clip": {**CLIPS, "clip_dual": 3.0},
    "reinforce": {},
    "gspo": CLIPS,
    "gmpo": CLIPS,
    "sapo": {},
    "cispo": CLIPS,
    "clip_cov": CLIPS,
    "kl_cov": {"kl_cov_coef": 0.1},
    "dppo_tv": {"ratio_cap": 3.0},
    "dppo_kl": {"ratio_cap": 3.0},
    "dro": {},
}
ESTIMATORS = (
    "gae",
    "grpo",
    "grpo_passk",
    "rloo",
    "opo",
    "gpg",
    "gdpo",
    "remax",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "optimal_token_baseline",
    "tir_optimal_token_baseline",
)
VALUES = {"gamma": 0.99, "lam": 0.95, "normalize_by_std": True, "reward_weights": [1.0, 0.5]}


def our_calls(workload: Workload) -> dict[str, Call]:
    """Returns each function by name, on ragged tokens that all carry loss."""
    from hybridflow.algorithms.advantage.registry import advantage_columns
    from hybridflow.algorithms.aggregation import token_weights
    from hybridflow.algorithms.correction import correct
    from hybridflow.algorithms.kl import KL_ESTIMATORS
    from hybridflow.algorithms.off_policy import off_policy_metrics
    from hybridflow.algorithms.policy_loss.registry import POLICY_LOSSES, STATISTICS
    from hybridflow.algorithms.value_loss import clipped_value_loss
    from hybridflow.batch import Batch

    made = numbers(workload)
    batch = Batch({"trajectory_B": torch.arange(workload.answers)}, lengths={"T": made["length_N"]})
    sequence_T = batch.sequence_of()
    batch["loss_mask_T"] = mask_T = torch.ones(len(sequence_T), dtype=torch.bool)
    batch["reward_T"] = torch.zeros(len(sequence_T)).index_copy_(0, batch.offsets["T"][1:] - 1, made["reward_N"])
    for name in ("group", "baseline"):
        batch[f"{name}_B"] = made[f"{name}_N"]
    batch["components_BK"] = made["components_NK"]
    for name in ("old_logp_T", "value_T", "sum_pi_squared_T"):
        batch[name] = made[name]
    columns = {**made, "mask_T": mask_T, "sequence_T": sequence_T, "token_key_T": torch.arange(len(sequence_T))}

    def backward(name: str, loss_M: Tensor, metrics: dict[str, Tensor], by: Tensor, mode: str) -> Tensor:
        loss = (loss_M * token_weights(batch, mode, norm=workload.longest)).sum()
        loss.backward()
        _ = float(loss.detach()), [float(value.mean()) for value in metrics.values()]
        gradient, by.grad = by.grad, None
        assert gradient is not None, name
        return gradient

    def loss(name: str) -> Tensor:
        logp_M = made["logp_T"].detach().requires_grad_()
        given = {k: v for k, v in columns.items() if k != "logp_T"}
        if name in STATISTICS:
            given |= called(STATISTICS[name], columns | CLIPS)
        given = {f"{k.removesuffix('T')}M": v for k, v in given.items()} | LOSSES[name]
        mode = "seq-mean-token-mean" if name in ("gmpo", "sapo") else "token-mean"
        return backward(name, *called(POLICY_LOSSES[name], given | {"logp_M": logp_M}), logp_M, mode)

    def value() -> Tensor:
        value_M = made["value_T"].detach().requires_grad_()
        found = clipped_value_loss(value_M, made["old_logp_T"], made["ref_logp_T"], clip_value=0.5)
        return backward("value", *found, value_M, "token-mean")

    def divergence() -> Tensor:
        logp_M = made["logp_T"].detach().requires_grad_()
        return backward("kl", KL_ESTIMATORS["k3_clamped"](logp_M, made["ref_logp_T"]), {}, logp_M, "token-mean")

    def correction() -> Any:
        data = made["logp_T"], made["old_logp_T"], mask_T, sequence_T, workload.answers
        found = correct(*data, weights="token", weight_cap=2.0, reject={"seq_mean_k1": BOUNDS})
        return found, off_policy_metrics(*data)

    calls: dict[str, Call] = {f"advantage {n}": lambda n=n: advantage_columns(n, batch, VALUES) for n in ESTIMATORS}
    calls |= {f"loss {n}": lambda n=n: loss(n) for n in LOSSES}
    return calls | {"loss value": value, "loss kl": divergence, "correction": correction}


def called(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Calls the function with those of the values that it has a parameter for."""
    return function(**{name: given[name] for name in inspect.signature(function).parameters if name in given})


# --- both sides ---


def compare(peer: str | None, rounds: int) -> Iterator[dict[str, Any]]:
    """Runs rounds in turns; yields the results until now after each."""
    commands = {"ours": [sys.executable, str(HERE / "algorithms_speed.py"), "--alone"]}
    if peer:
        commands["verl"] = [peer, str(HERE / "peer_verl_algorithms.py")]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
    versions: dict[str, str] = {}
    loads = []
    for turn in range(rounds):
        for side, command in commands.items():
            found = run_alone(command)
            runs[side].append(found["results"])
            versions |= found["versions"]
            loads.append(found["machine"]["load_average"][0])
            total = sum(x["cpu_s"] for x in found["results"].values())
            print(f"round {turn + 1}  {side:5} {total:.1f} CPU-s in all", flush=True)
        yield {"versions": versions, "results": medians(runs) | {"load_average_after_each_run": loads}}


def medians(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Computes per function the medians over rounds, and how many times as much verl spends, within a round."""
    functions: dict[str, dict[str, Any]] = {}
    for name in runs["ours"][0]:
        functions[name] = {
            side: {key: statistics.median(r[name][key] for r in rs) for key in KEYS} for side, rs in runs.items()
        }
        if "verl" in runs:
            pairs = [(ours[name], theirs[name]) for ours, theirs in zip(runs["ours"], runs["verl"])]
            functions[name]["verl_over_ours"] = {
                key: statistics.median(t[key] / o[key] for o, t in pairs) for key in KEYS
            }
    if "verl" not in runs:
        return {"rounds": len(runs["ours"]), "functions": functions}
    kinds = {"all": "", "advantages": "advantage ", "losses": "loss "}
    overall = {
        kind: {
            key: statistics.median(x["verl_over_ours"][key] for n, x in functions.items() if n.startswith(prefix))
            for key in KEYS
        }
        for kind, prefix in kinds.items()
    }
    return {"rounds": len(runs["ours"]), "functions": functions, "median_verl_over_ours": overall}


def table(results: dict[str, Any]) -> str:
    """Renders the results as text."""
    lines = []
    for name, sides in results["functions"].items():
        shown = [
            f"{side} {x['cpu_s']:7.3f} s {x['peak_mb']:6.0f} MB" for side, x in sides.items() if "over" not in side
        ]
        ratio = sides.get("verl_over_ours")
        lines.append(
            f"{name:40} {'   '.join(shown)}"
            + (f"   {ratio['cpu_s']:6.1f} x {ratio['peak_mb']:6.1f} x" if ratio else "")
        )
    if "median_verl_over_ours" in results:
        lines.append(f"median of the ratios: {results['median_verl_over_ours']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--peer", help="Python of an environment with verl; without it, this library alone is measured")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is measured")
    parser.add_argument("--alone", action="store_true", help="measure this library once, in this process")
    parser.add_argument("--only", help="with --alone: one function")
    parser.add_argument("--out", type=Path, default=HERE / "results/algorithms_speed.json")
    args = parser.parse_args()
    lengths = Workload().lengths()
    workload = asdict(Workload()) | {"tokens": sum(lengths), "padded_tokens": len(lengths) * max(lengths)}
    # Larger blocks go back to the system at once on both sides, so that the memory of a call is seen whole.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    if args.alone:
        results = run_side(our_calls, args.only)
        command = "python benchmarks/algorithms_speed.py --alone" + (f" --only '{args.only}'" if args.only else "")
        write(args.out, record(command, workload, results))
        print(table({"functions": {name: {"ours": x} for name, x in results.items()}}))
        return
    command = f"python benchmarks/algorithms_speed.py{' --peer VERL_PYTHON' * bool(args.peer)} --rounds {args.rounds}"
    for found in compare(args.peer, args.rounds):
        written = record(command, workload, found["results"])
        written["versions"] |= found["versions"]
        write(args.out, written)
        print(table(found["results"]), flush=True)


def write(path: Path, written: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
