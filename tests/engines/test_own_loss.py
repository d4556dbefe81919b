"""A loss of the user's own, with outputs and columns of its own, trains with every engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybridflow.config.sections.engine import LocalSection
from hybridflow.config.sections.model import ModelSection
from hybridflow.config.sections.optim import OptimSection
from hybridflow.config.sections.placement import PlacementSection
from hybridflow.controller.open import open_cluster
from hybridflow.placing.group_engine import GroupEngine
from hybridflow.placing.role import Role
from hybridflow.placing.train_worker import EngineWorker
from hybridflow.protocols.training import Loss, TrainEngine

from on_ranks.engines import Case
from simulated_ranks import RealRanks
from tiny import CARRY, ragged_batch

LOSS = """
from hybridflow.algorithms.losses import LossSpec, Reads, Terms

def towards(scores, columns, params):
    distance_M = (scores["logp"] - columns["target_T"]) ** 2 - params["coef"] * scores["entropy"]
    return Terms(distance_M * columns["share_T"], {}, {})

def spec():
    return LossSpec(towards, lambda params: Reads(("logp", "entropy"), ("target_T", "share_T"), entropy_gradient=True))
"""
SHARDED = {"strategy": "fsdp2"}


@pytest.fixture(params=["local", "sharded", "group"])
def engine(request: pytest.FixtureRequest) -> Iterator[TrainEngine | RealRanks]:
    if request.param == "local":
        yield Case().local()
    elif request.param == "sharded":
        yield RealRanks(Case(section=SHARDED), 2)
    else:
        role = Role(
            name="actor", model=ModelSection(path=f"{CARRY}:tiny_qwen3"), engine=LocalSection(),
            optim=OptimSection(lr=1e-3), total_steps=4, tokens_per_microbatch=20, longest=None, seed=0,
        )  # fmt: skip
        cluster = open_cluster(PlacementSection(backend="in_process"), device="cpu")
        yield GroupEngine(cluster.group("actor", EngineWorker, "all", role))
        cluster.close()


def test_a_loss_in_a_file_of_the_users_trains_with_every_engine(
    engine: TrainEngine | RealRanks, tmp_path: Path
) -> None:
    (tmp_path / "towards.py").write_text(LOSS)
    loss = Loss(f"{tmp_path / 'towards.py'}:spec", {"coef": 0.1})
    batch = ragged_batch()
    batch["target_T"] = torch.linspace(-3.0, -1.0, batch.total())
    batch["share_T"] = batch["loss_mask_T"] / batch["loss_mask_T"].sum()

    def expected() -> float:
        scores = engine.score(batch, ["logp", "entropy"])
        distance_T = (scores["logp"] - batch["target_T"]) ** 2 - 0.1 * scores["entropy"]
        return float((distance_T * batch["share_T"]).sum())

    first, update = expected(), engine.update(batch, loss)
    assert update.metrics["actor/loss"] == pytest.approx(first, abs=1e-5)
    assert expected() < first - 1e-3
