"""The cost of generation on one thread through each engine, and what our path adds to vLLM's own.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/rollout_engines.py    # writes results/rollout_engines.json

Batches, models and forced lengths are those of `generation.py`; each model has a process of its own, in which all
engines take turns:

- inline: this library's own engine, a request for each response.
- vLLM: `VllmEngine`, through `protocols.generation.generate`.
- bare vLLM: its `LLMEngine`, the same object, driven by a loop that adds all requests and steps until they have ended.
  Requests ask for what training needs, the log-probability of each token; "seeded" ones have a seed each too, as ours.
- generate of transformers: one padded batch, every row to the longest response.
- continuous batching of transformers: its manager, a request for each response with a length of its own.

The prefix cache of vLLM is emptied before each turn, as after an update. CPU seconds of the process, all threads
together; medians over the rounds. "added" is the time of our path over that of bare vLLM with seeds within a round.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from generation import ANSWERS, Work, load, make_work, theirs
from hybridflow.models.files import export_model
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, RolloutEngine, Sampling, generate
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.rollout.startup import EngineModel
from hybridflow.rollout.vllm.engine import VllmEngine

from measuring import record, run_alone

HERE = Path(__file__).resolve().parent
SERVED_TOKENS = 256  # longest sequence that vLLM is started for
Side = Callable[[Work, int], int]  # generates all responses of a batch in a round; returns how many tokens that were


def through(engine: RolloutEngine, work: Work, turn: int) -> int:
    """Generates with our engine, with a trainer's requests."""
    requests = [
        Request(tuple(work.prompts[i // ANSWERS]), Sampling(n), NoiseKey(turn, "train", i // ANSWERS, i % ANSWERS))
        for i, n in enumerate(work.lengths)
    ]
    return sum(len(result.token_ids) for result in generate(engine, requests))


def bare(engine: Any, work: Work, turn: int, *, seeded: bool) -> int:
    """Generates with vLLM's own loop: everything is added, then it steps until everything has ended."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    for i, n in enumerate(work.lengths):
        params = SamplingParams(
            max_tokens=n, temperature=1.0, ignore_eos=True, logprobs=0, detokenize=False,
            seed=turn * 100_000 + i if seeded else None, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        engine.add_request(
            f"bare-{turn}-{seeded}-{i}", {"type": "token", "prompt_token_ids": work.prompts[i // ANSWERS]}, params
        )
    tokens = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens += len(output.outputs[0].token_ids)
    return tokens


def continuous(model: PreTrainedModel, work: Work, turn: int) -> int:
    """Generates with the manager of transformers; its pages are made for this batch."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    needed = sum(-(-(len(work.prompts[i // ANSWERS]) + n) // 32) for i, n in enumerate(work.lengths))
    settings = ContinuousBatchingConfig(
        page_size=32, num_blocks=needed + 16, max_batch_tokens=4096, use_cuda_graph=False, seed=turn
    )
    sampling = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(work.lengths), eos_token_id=-1,
        pad_token_id=0,
    )  # fmt: skip
    tokens, left = 0, len(work.lengths)
    with model.continuous_batching_context_manager(
        generation_config=sampling, continuous_batching_config=settings, warmup=False
    ) as manager:
        for i, n in enumerate(work.lengths):
            manager.add_request(list(work.prompts[i // ANSWERS]), max_new_tokens=n, eos_token_id=-1)
        while left:
            result = manager.get_result(timeout=60)
            assert result is not None and result.error is None, result
            if result.is_finished():
                tokens, left = tokens + len(result.generated_tokens), left - 1
    return tokens


def sides(model: PreTrainedModel, folder: Path) -> tuple[dict[str, Side], VllmEngine]:
    """Returns the sides that take turns, and the vLLM engine, which the caller closes."""
    export_model(model, folder, torch.float32)
    ours = VllmEngine(EngineModel(folder, SERVED_TOKENS, engine_args={"max_num_seqs": 256}))  # no batch waits
    inner = ours._engine  # the bare loop drives the same engine
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")

    def padded(work: Work, turn: int) -> int:
        theirs(model, work, turn)
        return work.tokens

    return {
        "inline": lambda work, turn: through(InlineEngine(model), work, turn),
        "vLLM": lambda work, turn: through(ours, work, turn),
        "bare vLLM, seeded": lambda work, turn: bare(inner, work, turn, seeded=True),
        "bare vLLM": lambda work, turn: bare(inner, work, turn, seeded=False),
        "generate of transformers": padded,
        "continuous batching of transformers": lambda work, turn: continuous(plain, work, turn),
    }, ours


def measure(size: str, rounds: int, skip: list[str]) -> dict[str, Any]:
    """Measures all batches of a model: CPU seconds of each side in each round; the first, untimed, pays for
    warming up.
    """
    model, found = load(size), {}
    with tempfile.TemporaryDirectory() as folder:
        engines, vllm = sides(model, Path(folder))
        engines = {name: side for name, side in engines.items() if name not in skip}
        for name, work in make_work().items():
            if work.model != size:
                continue
            spent: dict[str, list[float]] = {side: [] for side in engines}
            for turn in range(rounds + 1):
                for side, run in engines.items():
                    vllm._engine.reset_prefix_cache()
                    began = time.process_time()
                    assert run(work, turn) == work.tokens, side
                    seconds = time.process_time() - began
                    if turn:
                        spent[side].append(seconds)
            found[name] = {side: line(work, seconds) for side, seconds in spent.items()}
            added = [a / b - 1 for a, b in zip(spent["vLLM"], spent["bare vLLM, seeded"])]
            found[name]["vLLM"] |= {"added": statistics.median(added), "added_in_each_round": added}
        vllm.close()
    return found


def line(work: Work, seconds: list[float]) -> dict[str, Any]:
    middle = statistics.median(seconds)
    return {"cpu_s": middle, "tokens_per_cpu_s": work.tokens / middle, "cpu_s_of_each_round": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], help="names of engines")
    parser.add_argument("--only", choices=["0.8M", "41M"], help="measure one model, in this process")
    parser.add_argument("--out", type=Path, default=HERE / "results/rollout_engines.json")
    args = parser.parse_args()
    command = f"OMP_NUM_THREADS=1 python benchmarks/rollout_engines.py --rounds {args.rounds}"
    if args.only:
        command += f" --only {args.only}"
        torch.set_num_threads(1)
        results = measure(args.only, args.rounds, args.skip)
    else:
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
        results = {}
        for size in ("0.8M", "41M"):
            child = [sys.executable, __file__, "--only", size, "--rounds", str(args.rounds)]
            results |= run_alone([*child, "--skip", *args.skip])["results"]
    for name, found in results.items():
        for side, measured in found.items():
            added = f"  added {measured['added']:+.1%}" if "added" in measured else ""
            print(f"{name:16} {side:36} {measured['tokens_per_cpu_s']:8.0f} tok/CPU-s{added}", flush=True)
    described = {
        name: {"model": w.model, "rows": len(w.lengths), "tokens": w.tokens, "longest": max(w.lengths)}
        for name, w in make_work().items()
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record(command, described, results), indent=1) + "\n")


if __name__ == "__main__":
    main()
