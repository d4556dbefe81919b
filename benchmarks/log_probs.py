"""The cost of log-probabilities of 1,024 tokens over a vocabulary of 152 thousand, all logits at once and in tiles.

    OMP_NUM_THREADS=1 python benchmarks/log_probs.py benchmarks/results/log_probs.json

Each measurement is a process of its own: forward and backward once, with a weight whose gradient exists already. Peak
memory is the process's highest resident size above that before the call, so it counts no inputs; the gradient that the
weight gets counts, and is given beside it. The sides take turns, and the least CPU seconds of all rounds are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from measuring import record, run_alone

TOKENS, WORDS, TEMPERATURE = 1_024, 151_936, 0.9
CASES: dict[str, dict[str, Any]] = {
    "log-probs": {},
    "log-probs and entropies with gradient": {"entropy": "with gradient"},
    "soft-capped logits": {"softcap": 30.0},
}


def resident(key: str) -> float:
    """Returns megabytes (2^20), from the kernel's account of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


def measure(way: str, size: int, entropy: str, softcap: float | None) -> dict[str, float]:
    """Measures one forward and backward pass in this process."""
    import torch

    from hybridflow.models import log_probs
    from hybridflow.models.head import Head

    if way == "plain":
        log_probs.SMALL = 2**62  # everything at once, by torch's own log_softmax
    torch.manual_seed(0)
    layer = torch.nn.Linear(size, WORDS, bias=False)
    torch.nn.init.normal_(layer.weight, std=size**-0.5)
    layer.weight.grad = torch.zeros_like(layer.weight)
    hidden_MD = torch.randn(TOKENS, size, requires_grad=True)
    target_M, weight_M = torch.randint(WORDS, (TOKENS,)), torch.randn(TOKENS) / TOKENS
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = resident("VmRSS"), time.process_time()
    logp_M, entropy_M = log_probs.token_logps(
        hidden_MD,
        Head(layer, softcap=softcap),
        target_M,
        temperature=TEMPERATURE,
        entropy=entropy,  # type: ignore[arg-type]
    )
    forward = time.process_time() - began
    loss = (logp_M * weight_M).sum()
    if entropy_M is not None:
        loss = loss + entropy_M.mean()
    loss.backward()
    assert hidden_MD.grad is not None
    return {
        "forward_cpu_seconds": forward,
        "cpu_seconds": time.process_time() - began,
        "peak_mb": resident("VmHWM") - before,
        "weight_gradient_mb": layer.weight.nbytes / 2**20,
        "logp_mean": float(logp_M.detach().double().mean()),
        "weight_gradient_norm": float(layer.weight.grad.double().norm()),
        "hidden_gradient_norm": float(hidden_MD.grad.double().norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "SIZE", "CASE"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.measure:
        way, size, case = args.measure
        options = {"entropy": "no", "softcap": None} | CASES[case]
        args.out.write_text(json.dumps(measure(way, int(size), **options)))
        return
    results = []
    for size in args.sizes:
        for case in CASES:
            rounds: dict[str, list[dict[str, float]]] = {"plain": [], "tiled": []}
            for _ in range(args.rounds):
                for way, found in rounds.items():
                    found.append(run_alone([sys.executable, __file__, "--measure", way, str(size), case]))
            best = {way: min(found, key=lambda r: r["cpu_seconds"]) for way, found in rounds.items()}
            peaks = {way: max(r["peak_mb"] for r in found) for way, found in rounds.items()}
            before, after = (best[way]["cpu_seconds"] for way in rounds)
            ratio = before / after
            results.append({"hidden_size": size, "case": case, "times_as_quick": ratio, "peak_mb": peaks} | rounds)
            print(
                f"hidden {size}, {case}: peak {peaks['plain']:.0f} -> {peaks['tiled']:.0f} MB, "
                f"CPU seconds {before:.2f} -> {after:.2f} ({ratio:.2f} times as quick)",
                flush=True,
            )
    if args.target:
        command = " ".join(["OMP_NUM_THREADS=1 python benchmarks/log_probs.py", *sys.argv[1:]])
        workload = {"tokens": TOKENS, "vocabulary": WORDS, "dtype": "float32", "temperature": TEMPERATURE}
        args.target.write_text(json.dumps(record(command, workload, results), indent=1) + "\n")


if __name__ == "__main__":
    main()
