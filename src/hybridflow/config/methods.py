"""What methods are called elsewhere, such as Dr.GRPO or REINFORCE++, and what they are called here."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hybridflow.config.pieces.presets import PRESETS
from hybridflow.errors import nearest

# Methods by their common names: what they are here. Keys have small letters and digits only.
_METHODS: dict[str, str] = {
    "dpo": "a loss on pairs, hybridflow.algorithms.preference.dpo, without a trainer; pairs train a reward model "
    "(hybridflow reward-model), with which ppo or grpo then trains",
    "ipo": "a loss on pairs, hybridflow.algorithms.preference.ipo, without a trainer",
    "simpo": "a loss on pairs, hybridflow.algorithms.preference.simpo, without a trainer",
    "orpo": "a loss on pairs, hybridflow.algorithms.preference.orpo, without a trainer",
    "kto": "a loss on good and bad responses, hybridflow.algorithms.preference.kto, without a trainer",
    "cpo": "a loss on pairs that is not there; the nearest is hybridflow.algorithms.preference.simpo",
    "onlinedpo": "not there; grpo with a reward model (reward.function=model) is the nearest",
    "nashmd": "not there; sppo is the nearest",
    "xpo": "not there; grpo with a reward model (reward.function=model) is the nearest",
    "sft": "a command of its own: hybridflow sft",
    "rm": "a command of its own: hybridflow reward-model",
    "rewardmodel": "a command of its own: hybridflow reward-model",
    "raft": "hybridflow eval with several samples, then hybridflow sft on the best",
    "rejectionsampling": "hybridflow eval with several samples, then hybridflow sft on the best",
    "bestofn": "hybridflow eval with several samples, then hybridflow sft on the best",
    "gkd": "algorithm.preset=distillation, with the teacher in model.reference",
    "opd": "algorithm.preset=distillation, with the teacher in model.reference",
    "onpolicydistillation": "algorithm.preset=distillation, with the teacher in model.reference",
    "minillm": "algorithm.preset=distillation, with the teacher in model.reference",
    "prime": "losses of implicit rewards as functions, hybridflow.algorithms.prime",
    "pfppo": "the section reweight, beside algorithm.preset=ppo",
    "a2c": "algorithm.preset=ppo with algorithm.policy_loss=reinforce",
    "actorcritic": "algorithm.preset=ppo with algorithm.policy_loss=reinforce",
    "trpo": "not there; ppo is what came after it",
    "reinforce": "algorithm.policy_loss=reinforce; presets with a baseline: rloo, remax, opo, reinforce_plus_plus",
    "policygradient": "algorithm.policy_loss=reinforce; as a preset with a baseline: rloo, remax, opo",
    "vanilla": "algorithm.policy_loss=ppo_clip",
    "ppoloss": "algorithm.policy_loss=ppo_clip",
    "regular": "algorithm.policy_loss=ppo_clip",
    "bnpo": "algorithm.preset=grpo with algorithm.aggregation=token-mean",
    "drgrpo": "dr_grpo",
    "reinforcepp": "reinforce_plus_plus",
    "rpp": "reinforce_plus_plus",
    "reinforceplusplus": "reinforce_plus_plus",
    "reinforcebaseline": "reinforce_plus_plus_baseline",
    "reinforceppbaseline": "reinforce_plus_plus_baseline",
    "groupnorm": "grpo",
    "grpovectorized": "grpo",
    "rloovectorized": "rloo",
    "passk": "grpo_passk",
    "geomean": "gmpo",
    "gspotoken": "algorithm.policy_loss=gspo_token",
    "optimaltokenbaseline": "algorithm.advantage=optimal_token_baseline, in the preset otb",
    "bypassmode": "algorithm.correction.mode=bypass",
    "lowvarkl": "k3_clamped",
    "mse": "k2",
    "kl": "k1",
    "full": "not there; k1, k2 and k3 estimate the divergence from the tokens that were sampled",
    "seqmean": "algorithm.aggregation=seq-mean-token-mean",
    "mean": "algorithm.aggregation=token-mean",
    "sum": "algorithm.aggregation=token-sum",
}


def unknown_name(name: str, known: Iterable[str]) -> str:
    """Returns the hint that follows an unknown preset, estimator or loss: the name here for a method of that name, or
    the nearest name.

    >>> unknown_name("Dr.GRPO", ["grpo", "dr_grpo"])
    "did you mean 'dr_grpo'?"
    """
    known = list(known)
    plain = _plain(name)
    same = next((k for k in known if _plain(k) == plain), None)
    preset = next((f"a preset, algorithm.preset={preset}" for preset in PRESETS if _plain(preset) == plain), None)
    found = same or _METHODS.get(plain) or preset
    if found is None:
        return nearest(name, known)
    return f"did you mean {found!r}?" if found in known else f"{name} is {found}"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "plusplus"))
