"""Replicas in the processes of a pool are one engine: requests may choose one, and results say which."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from hybridflow.config.sections.engine import LocalSection
from hybridflow.config.sections.model import ModelSection
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.config.sections.rollout import InlineSection
from hybridflow.controller.open import open_cluster
from hybridflow.models.attention import ATTENTION
from hybridflow.noise import NoiseKey
from hybridflow.placing.group_rollout import GroupRollout
from hybridflow.placing.role import Role
from hybridflow.placing.rollout_worker import RolloutWorker
from hybridflow.protocols.generation import Request, Sampling, generate
from hybridflow.rollout.inline.engine import InlineEngine

from conformance import model_of, tokenizer


@pytest.mark.slow
def test_turns_choose_their_replica_and_a_wait_on_replicas_is_interrupted(tmp_path: Path) -> None:
    model = model_of("qwen3")
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model.set_attn_implementation(ATTENTION)
    role = Role(
        name="actor", model=ModelSection(path=str(tmp_path)), engine=LocalSection(), optim=None,
        tokens_per_microbatch=1024, longest=None, seed=0,
    )  # fmt: skip
    section = InlineSection(max_response_tokens=8)
    asked = [Request((i + 1, i + 2, 5), Sampling(8), NoiseKey(0, "train", i)) for i in range(6)]
    with open_cluster(PlacementSection(pools={"all": 2}), device="cpu") as cluster:
        engine = GroupRollout(cluster.group("rollout", RolloutWorker, "all", role, section, None))
        first = generate(engine, asked)
        assert {r.replica for r in first} == {0, 1}
        turns = [
            Request((*q.prompt_ids, *r.token_ids, 7), Sampling(8), q.noise, replica=r.replica, position=8)
            for q, r in zip(asked, first)
        ]
        second = generate(engine, turns)
        assert [r.replica for r in second] == [r.replica for r in first]
        alone = InlineEngine(model)
        assert [r.token_ids for r in first + second] == [r.token_ids for r in generate(alone, [*asked, *turns])]

        long = replace(asked[0], sampling=Sampling(240))
        handle = engine.submit(long)
        engine.interrupt()
        assert engine.wait() == []
        threading.Timer(0.1, engine.interrupt).start()
        results = []
        waits = 0
        while not results:
            results, waits = engine.wait(), waits + 1
        assert waits <= 2, "one interruption ends one `wait`"
        assert [r.handle for r in results] == [handle]
        assert results[0].token_ids == generate(alone, [long])[0].token_ids
