"""Differences of a run from verl's defaults: printed where the rows are verl's, for users who compare two runs."""

from __future__ import annotations

from collections.abc import Iterator

from hybridflow.config.kinds.rl import RlConfig
from hybridflow.data.prompts import VERL_TRUTH
from hybridflow.data.rows import Row, has_column


def is_verl_row(row: Row) -> bool:
    """Returns whether a row has the form that verl's data scripts write."""
    return "data_source" in row and has_column(row, VERL_TRUTH)


def differences_from_verl(config: RlConfig) -> Iterator[str]:
    """Yields lines on the values of a configuration that differ from verl's defaults."""
    a, c, o = config.algorithm, config.critic, config.optim
    loss = {
        f"algorithm.aggregation={a.aggregation} (verl: token-mean)": a.aggregation != "token-mean",
        "algorithm.clip_dual unset (verl: 3.0)": a.clip_dual is None and a.policy_loss == "ppo_clip",
        f"algorithm.lam={a.lam:g} (verl: 1.0)": a.advantage == "gae" and a.lam != 1,
        "algorithm.kl_loss_estimator=k3, not clamped (verl: low_var_kl, clamped)": bool(a.kl_loss_coef)
        and a.kl_loss_estimator == "k3",
        f"optim.weight_decay={o.weight_decay:g} on matrices only (verl: 0.01 on all)": o.weight_decay != 0.01,
        f"the critic's lr is optim.lr={o.lr:g} (verl: 1e-5)": c is not None and not c.shared_trunk and c.optim is None,
    }
    run = {
        "train.sequences_per_update counts responses (verl's ppo_mini_batch_size: prompts)": True,
        f"checkpoint.keep={config.checkpoint.keep} (verl: all)": True,
        "model.activation_checkpointing=false (verl: on)": not config.model.activation_checkpointing,
        "0 means never, as in eval.every (verl: -1)": True,
    }
    yield "advice: these rows have verl's form; this run differs from verl's defaults, if you compare the two:"
    for part in (loss, run):
        said = [text for text, differs in part.items() if differs]
        if said:
            yield "  " + "; ".join(said)
