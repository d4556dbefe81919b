"""Where our numbers are not verl's on purpose: (here, there) of one number, and why; where verl is installed.

How to run this: see `test_against_verl.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridflow.algorithms.advantage.registry import ADVANTAGES
from hybridflow.algorithms.aggregation import token_weights
from hybridflow.algorithms.correction import correct
from hybridflow.algorithms.kl import KL_ESTIMATORS
from hybridflow.algorithms.off_policy import off_policy_metrics
from hybridflow.evaluation.statistics import pass_at_k
from verl_peer import (
    ACTOR,
    CLIPS,
    Case,
    actor,
    both_advantages,
    core,
    our_loss,
    ours_and_peers_correction,
    peer_correction,
    peer_loss,
)

EMPTY_ROWS = (2, 9)


def _singleton(name: str) -> tuple[float, float]:
    index, one = np.array(["a"], dtype=object), torch.ones(1, 1)
    with pytest.raises(ValueError, match="single trajectory"):
        ADVANTAGES[name.partition("_")[0]](torch.ones(1), torch.zeros(1, dtype=torch.int64))
    return float("nan"), float(core.get_adv_estimator_fn(name)(one.clone(), one, index)[0])


def _masked_gae() -> tuple[float, float]:
    case = Case(0)
    advantage_T, _ = ADVANTAGES["gae"](
        case.normal() * case.mask_T, case.normal(), case.mask_T, case.sequence_T, gamma=1.0, lam=1.0
    )
    padding = core.compute_gae_advantage_return(*(case.padded(case.normal()),) * 2, case.mask_BL, 1.0, 1.0)[0][0, -1]
    return float(advantage_T[~case.mask_T].abs().max()), float(padding)


def _advantage_at_equal_rewards(name: str) -> tuple[float, float]:
    """The largest advantage in a group whose rewards are equal."""
    reward_N, group_N = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    mask_BL = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 1]])
    token_BL = torch.zeros(4, 2).scatter_(1, mask_BL.sum(1, keepdim=True) - 1, reward_N[:, None])
    theirs = core.get_adv_estimator_fn(name)(token_BL, mask_BL, group_N.numpy())[0]
    return float(ADVANTAGES[name](reward_N[:, None], group_N)[:2].abs().max()), float(theirs[:2].abs().max())


def _gpg_of_right_and_wrong() -> tuple[float, float]:
    reward_N, group_N, one = torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.int64), torch.ones(2, 1)
    theirs = core.compute_gpg_outcome_advantage(reward_N[:, None].clone(), one, group_N.numpy())[0]
    return float(ADVANTAGES["gpg"](reward_N, group_N)[0]), float(theirs[0])


def _reward_on_a_rejected_token() -> tuple[float, float]:
    """The first token's advantage where the last of two, which has the reward, is rejected."""
    reward_T, none_N, every_T = torch.tensor([0.0, 1.0]), torch.zeros(1), torch.ones(2, dtype=torch.bool)
    ours_T = ADVANTAGES["remax"](reward_T, none_N, every_T, torch.zeros(2, dtype=torch.int64), gamma=1.0)
    theirs_BL, _ = core.compute_remax_outcome_advantage(reward_T[None], none_N, torch.tensor([[1, 0]]))
    return float(ours_T[0]), float(theirs_BL[0, 0])


def _baseline_with_tools() -> tuple[float, float]:
    found = both_advantages(Case(0), "optimal_token_baseline", "optimal_token_baseline", {})
    return float(found[0][0].abs().sum()), float(found[1][0].abs().sum())


def _mode_obeyed(theirs: str, ours: str) -> tuple[float, float]:
    """How far the losses of two modes are apart."""
    case, two, values = Case(0), ("token-mean", "seq-mean-token-mean"), ({"clip_low": 0.2} if ours == "gmpo" else {})
    here, there = (
        [f(case, n, v, m)[0] for m in two] for f, n, v in ((our_loss, ours, values), (peer_loss, theirs, {}))
    )
    ours_apart, theirs_apart = (float((x - y).detach().abs()) for x, y in (here, there))
    return ours_apart, theirs_apart


def _split(theirs: str, ours: str) -> tuple[float, float]:
    """The loss of rows 0 to 4 and that of the others, as micro-batches of one mini-batch, less the loss of it all."""
    case, mode = Case(0, spread=1.0), "seq-mean-token-mean"
    values = {"kl_cov": {"kl_cov_coef": 0.1}, "clip_cov": CLIPS, "gmpo": CLIPS}[ours]
    first_T = case.sequence_T < 5

    def here(part_T: Tensor | None) -> float:
        return float(our_loss(case, ours, values, mode, part_T)[0].detach())

    def there(rows: slice) -> float:
        columns = [case.padded(x)[rows] for x in (case.old_logp_T, case.logp_T, case.advantage_T)]
        return float(core.get_policy_loss_fn(theirs)(*columns, case.mask_BL[rows], mode, actor(case, ACTOR))[0])

    apart = there(slice(0, 5)) + there(slice(5, None)) - there(slice(None))
    return here(first_T) + here(~first_T) - here(None), apart


def _pass_at_two() -> tuple[float, float]:
    """Best of two, where two answers of four are right."""
    metric_utils = pytest.importorskip("verl.trainer.ppo.metric_utils")
    found = metric_utils.process_validation_metrics(["x"] * 4, ["p"] * 4, {"reward": [1.0, 0.0, 0.0, 1.0]})
    return pass_at_k(4, 2, 2), found["x"]["reward"]["best@2/mean"]


def _empty_rows_in_a_mean() -> tuple[float, float]:
    case = Case(0, empty=EMPTY_ROWS)
    one_T = torch.ones(case.total, dtype=torch.float64)
    ours = token_weights(case.batch(), "seq-mean-token-mean", norm=1).sum()
    return float(ours), float(core.agg_loss(case.padded(one_T), case.mask_BL, "seq-mean-token-mean"))


def _corrected(key: str, *, empty: tuple[int, ...] = (), **values: Any) -> tuple[float, float]:
    case = Case(0, empty=empty)
    values = {"weights": "token", "weight_cap": 1.2, "weight_floor": None, "normalize": False, "reject": {}} | values
    ours, theirs = ours_and_peers_correction(case, values)
    found = off_policy_metrics(case.logp_T, case.old_logp_T, case.mask_T, case.sequence_T, 17) | ours.metrics
    return found[f"rollout_corr/{key}"], theirs[2][f"rollout_corr/{key}"]


def _nothing_in_the_band() -> tuple[float, float]:
    case, band = Case(0), {"weights": "token", "weight_cap": 1e-3, "weight_floor": 1e-4, "normalize": False}
    with pytest.raises(ZeroDivisionError):
        peer_correction(case, band | {"reject": {}})
    ours = correct(case.logp_T, case.old_logp_T, case.mask_T, case.sequence_T, 17, **band)
    return ours.metrics["rollout_corr/rollout_is_eff_sample_size"], float("nan")


def _loss_at(distance: float, theirs: str, ours: str) -> tuple[float, float]:
    """The loss where the policy has come so far for the worse of advantages of -1."""
    case = Case(0)
    case.old_logp_T, case.logp_T = torch.full_like(case.logp_T, -distance - 1), torch.full_like(case.logp_T, -1.0)
    case.advantage_T = torch.full_like(case.logp_T, -1.0)
    values, mode = ({"kl_cov_coef": 0.1} if ours == "kl_cov" else {}), "token-mean"
    here, there = our_loss(case, ours, values, mode), peer_loss(case, theirs, {}, mode)
    return float(here[0].detach()), float(there[0].detach())


def _metric(theirs: str, ours: str, key: str) -> tuple[float, float]:
    case = Case(0)
    here, there = our_loss(case, ours, CLIPS, "token-mean"), peer_loss(case, theirs, ACTOR, "token-mean")
    return float(here[2][key]), there[2][key]


def _far_divergence() -> tuple[float, float]:
    logp, ref = torch.tensor([-9.0]), torch.tensor([-4.0])
    return float(KL_ESTIMATORS["k3"](logp, ref)), float(core.kl_penalty(logp, ref, "k3"))


DISAGREEMENTS: dict[str, tuple[str, Callable[..., tuple[float, float]], tuple[Any, ...], dict[str, Any]]] = {
    "group of one, grpo": ("refused here: there is nothing to compare with", _singleton, ("grpo",), {}),
    "group of one, rloo": ("refused here; verl's own two forms differ", _singleton, ("rloo",), {}),
    "group of one, rloo_vectorized": ("refused here", _singleton, ("rloo_vectorized",), {}),
    "gae without loss": ("0 here where no loss is; there what is left of whitening", _masked_gae, (), {}),
    "gdpo, equal rewards": (
        "whitened over trajectories, as in the paper: equal rewards have no advantage, long answers no more say",
        _advantage_at_equal_rewards,
        ("gdpo",),
        {},
    ),
    "gpg, right and wrong": (
        "the paper counts groups without a signal, verl rewards of 0",
        _gpg_of_right_and_wrong,
        (),
        {},
    ),
    "reward on a rejected token": (
        "advantages see whole answers here, there what is left of them",
        _reward_on_a_rejected_token,
        (),
        {},
    ),
    "otb with tools": (
        "alone is who has the only token at a time; verl looks for that by numbers of loss tokens",
        _baseline_with_tools,
        (),
        {},
    ),
    "gmpo, mode": (
        "obeys it; verl always takes the mean over rows of the micro-batch",
        _mode_obeyed,
        ("geo_mean", "gmpo"),
        {},
    ),
    "sapo, mode": ("obeys it; verl always takes seq-mean-token-mean", _mode_obeyed, ("sapo", "sapo"), {}),
    "geo_mean, split": (
        "verl's mean ignores what the mini-batch holds",
        _split,
        ("geo_mean", "gmpo"),
        {},
    ),
    "kl_cov, split": ("statistics of the mini-batch here", _split, ("kl_cov", "kl_cov"), {}),
    "clip_cov, split": (
        "statistics of the mini-batch and stateless picks here; the global generator and micro-batches there",
        _split,
        ("clip_cov", "clip_cov"),
        {},
    ),
    "empty rows": ("count in a mean here; there only if the global number is given", _empty_rows_in_a_mean, (), {}),
    "normalised and rejected": (
        "the mean weight is 1 over what is kept here, over all there",
        _corrected,
        ("rollout_is_batch_norm_factor",),
        {"normalize": True, "reject": {"token_k1": [0.8, 1.2]}},
    ),
    "perplexity of empty rows": ("they have none here, 1 there", _corrected, ("training_ppl",), {"empty": EMPTY_ROWS}),
    "weight of empty rows": (
        "they have none here, 0 there",
        _corrected,
        ("rollout_is_seq_min",),
        {"empty": EMPTY_ROWS},
    ),
    "nothing in the band": ("an effective sample size of 0; verl divides by 0", _nothing_in_the_band, (), {}),
    "gspo, far off": (
        "the bound of a log-ratio is 20 everywhere here, 10 in verl's",
        _loss_at,
        (15.0, "gspo", "gspo"),
        {},
    ),
    "kl_cov, far off": ("bounded here, infinite in time there", _loss_at, (30.0, "kl_cov", "kl_cov"), {}),
    "gmpo, clipped share": ("what was cut; verl counts both sides", _metric, ("geo_mean", "gmpo", "pg_clipfrac"), {}),
    "clip_cov, clipped share": (
        "the surrogate's clip; what was dropped is cov_clipfrac here, pg_clipfrac there",
        _metric,
        ("clip_cov", "clip_cov", "pg_clipfrac"),
        {},
    ),
    "best of two": ("unbiased here; drawn with replacement there", _pass_at_two, (), {}),
    "k3, far off": ("k3 has no bound above here; verl's is k3_clamped", _far_divergence, (), {}),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_known_disagreements_are_still_so(name: str) -> None:
    reason, both, args, keywords = DISAGREEMENTS[name]
    ours, theirs = both(*args, **keywords)
    print(f"{name:32} here {ours:12.6g}   verl {theirs:12.6g}   {reason}")
    assert not abs(ours - theirs) < 1e-4
