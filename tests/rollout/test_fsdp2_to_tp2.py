"""An actor cut over two processes publishes into two tensor-parallel workers of vLLM; no process has all of it."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hybridflow.protocols.generation import generate
from hybridflow.protocols.weights import WeightStream
from hybridflow.rollout.startup import EngineModel
from hybridflow.rollout.vllm.engine import VllmEngine
from hybridflow.weights.stream import verify

from conformance import CONTEXT, FAR, TOLERANCE, gap, model_of, requests
from on_ranks import weights
from ranks import Ranks


@pytest.mark.vllm
def test_halves_of_fsdp2_reach_two_workers_tensor_by_tensor(tmp_path: Path) -> None:
    """Buckets smaller than the larger tensors; whole the first time, and as patches after that."""
    model = model_of("qwen3")
    model.save_pretrained(tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    actor = Ranks(2)
    engine = VllmEngine(EngineModel(tmp_path, CONTEXT, tensor_parallel=2), mode="workers")
    try:
        assert len(engine.receivers()) == 2
        asked = requests(4)
        with ThreadPoolExecutor(1) as pool:
            how = {"bucket_bytes": 1 << 15, "delta": True}
            sent = pool.submit(actor.run, weights.send_halves, port, 2, 2, **how)
            taken = []
            for version in (1, 2):
                taken.append(engine.receive_weights(f"127.0.0.1:{port}", version))
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.2)
                results = generate(engine, asked)
                assert gap(model, asked, results) < TOLERANCE
                assert gap(model_of("qwen3"), asked, results) > FAR
            published, others = sent.result()
        assert others == [{}, {}]
        for version, receipts, left in zip((1, 2), taken, published, strict=True):
            assert len(receipts) == 2
            verify(WeightStream(iter(()), frozenset(left), left), receipts, version)
    finally:
        engine.close()
        actor.close()
