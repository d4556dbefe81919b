"""The cost of verifying that an engine samples from the weights that were published.

    OMP_NUM_THREADS=1 python benchmarks/verified_sync.py inline benchmarks/results/verified_sync.json
    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/verified_sync.py vllm benchmarks/results/verified_sync_vllm.json

A trainer of 27 million parameters (108 MB in float32) publishes to an engine in the same process that has weights of
its own. "bare" is the publication with nothing checked; "receipts" the same with the fingerprints of both sides
compared; "canary" one response of 16 tokens and its score. The first publication of a run has the drill in it. CPU
seconds, the least of the rounds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.local import LocalEngine
from hybridflow.models.attention import ATTENTION
from hybridflow.publishing.canary import Canary
from hybridflow.publishing.publisher import Publisher, deliver
from hybridflow.rollout.inline.engine import InlineEngine
from hybridflow.rollout.startup import EngineModel
from hybridflow.weights import stream as streams
from hybridflow.weights.stream import fingerprint, stream_of

from measuring import record

ROUNDS, CONTEXT, VOCAB = 6, 512, 2048


def model() -> Any:
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=CONTEXT, tie_word_embeddings=True, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    made = Qwen3ForCausalLM(config).eval()
    made.set_attn_implementation(ATTENTION)
    return made


def least(action: Callable[[], Any], rounds: int = ROUNDS) -> float:
    found = []
    for _ in range(rounds):
        began = time.process_time()
        action()
        found.append(time.process_time() - began)
    return min(found)


def engine_of(kind: str, folder: str) -> Any:
    if kind == "inline":
        return InlineEngine(model())
    from hybridflow.rollout.vllm.engine import VllmEngine

    model().save_pretrained(folder)
    return VllmEngine(EngineModel(folder, CONTEXT))


def measured(kind: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        rollout = engine_of(kind, folder)
        trainer = LocalEngine(model(), OptimSection(), total_steps=1, tokens_per_microbatch=4096)
        canary = Canary(
            trainer=trainer, rollout=rollout, tokens=range(2, VOCAB), room=CONTEXT, keep=lambda results: None
        )
        publisher = Publisher(canary, lambda: stream_of(trainer.model))
        first = least(lambda: publisher.publish(0), rounds=1)
        whole = least(lambda: publisher.publish(1))
        receipts = least(lambda: publisher.send(2))
        asked = least(lambda: canary.gap(canary.ask(3)))
        read_back = least(publisher.held)

        real = streams.fingerprint
        streams.fingerprint = lambda tensor: 0
        try:
            bare = least(lambda: deliver(stream_of(trainer.model, fingerprints=False), rollout, 4))
        finally:
            streams.fingerprint = real
        num_bytes = sum(t.nbytes for t in trainer.published().values())
        tensors = list(trainer.published().values())
        alone = least(lambda: [fingerprint(t) for t in tensors])
        copies = [torch.empty_like(t) for t in tensors]
        copy = least(lambda: [c.copy_(t) for c, t in zip(copies, tensors)])
        rollout.close()
    return {
        "bytes": num_bytes,
        "plain_copy_cpu_s": round(copy, 4),
        "bare_cpu_s": round(bare, 4),
        "receipts_cpu_s": round(receipts, 4),
        "receipts_more_than_bare": round(receipts / bare - 1, 3),
        "canary_cpu_s": round(asked, 4),
        "whole_publication_cpu_s": round(whole, 4),
        "first_publication_with_drill_cpu_s": round(first, 4),
        "read_back_cpu_s": round(read_back, 4),
        "fingerprint_GB_per_s": round(num_bytes / alone / 1e9, 2),
    }


def main() -> None:
    torch.set_num_threads(1)
    kind = sys.argv[1] if len(sys.argv) > 1 else "inline"
    workload = {"engine": kind, "rounds": ROUNDS, "context": CONTEXT, "vocabulary": VOCAB}
    with torch.no_grad():
        text = json.dumps(record(f"python benchmarks/verified_sync.py {kind}", workload, measured(kind)), indent=2)
    print(text)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text + "\n")


if __name__ == "__main__":
    main()
