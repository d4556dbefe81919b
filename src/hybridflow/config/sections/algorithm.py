"""The sections that say how a step's responses become a loss: the algorithm, its correction, its filters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from hybridflow.config.locate import is_function_reference
from hybridflow.config.methods import unknown_name
from hybridflow.config.paths import FunctionName
from hybridflow.config.pieces.needs import needs_of
from hybridflow.config.pieces.presets import CORRECTIONS, PRESETS, REJECTION_LEVELS
from hybridflow.config.pieces.tables import ADVANTAGES, AGGREGATIONS, KL_ESTIMATORS, POLICY_LOSSES, USERS, values_taken
from hybridflow.config.sections.base import Section, either
from hybridflow.errors import nearest

PIECES = "advantage", "policy_loss", "aggregation"


def filled_from(values: object, presets: Mapping[str, Mapping[str, Any]], *, default: str) -> object:
    """Returns the values of a section, with those of its preset where nothing is given.

    Raises:
        ValueError: there is no such preset.
    """
    if not isinstance(values, dict):
        return values
    preset = values.get("preset", default)
    if preset not in presets:
        raise ValueError(f"unknown preset {preset!r}; {unknown_name(str(preset), presets)}")
    return {**presets[preset], **values, "preset": preset}


class CorrectionSection(Section):
    """Correction of the mismatch between the engine that samples and the policy that is trained."""

    preset: str = Field("disabled", description="Named set of values for the keys below, by verl's names.")
    mode: Literal["decoupled", "bypass"] = Field(
        "decoupled",
        description="decoupled: the log-probabilities of the policy at the start of the step are computed, and "
        "compared with the sampler's; bypass: the sampler's take their place, and the current policy is "
        "compared with the sampler.",
    )
    weights: Literal["none", "token", "sequence"] = Field(
        "none",
        description="Importance weights on the policy loss: none, one for each token, or one for each sequence: the "
        "whole response, or each sequence of an agent's trajectory (see agent.history).",
    )
    weight_cap: PositiveFloat = Field(2.0, description="Largest importance weight; larger ones are set to it.")
    weight_floor: PositiveFloat | None = Field(
        None,
        description="Smallest importance weight: weights outside of [weight_floor, weight_cap] become 0 (IcePop); "
        "unset: no floor.",
    )
    normalize: bool = Field(False, description="Divide the weights by their mean.")
    reject: dict[str, list[float]] = Field(
        default_factory=dict,
        description="Bounds outside of which tokens or whole sequences have no loss. A name is token_, seq_sum_, "
        "seq_mean_ or seq_max_ followed by k1, k2 or k3. For k1: the two bounds of the sampler's "
        "probability over the policy's, such as {seq_mean_k1: [0.9, 1.1]}, or the upper one, whose "
        "reciprocal is the lower; for k2 and k3: an upper bound.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: object) -> object:
        return filled_from(values, CORRECTIONS, default="disabled")

    @model_validator(mode="after")
    def _check_bounds(self) -> CorrectionSection:
        if self.weight_floor is not None and self.weight_floor >= self.weight_cap:
            raise ValueError(f"weight_floor {self.weight_floor:g} is not below weight_cap {self.weight_cap:g}")
        for level, bounds in self.reject.items():
            if level not in REJECTION_LEVELS:
                raise ValueError(f"unknown level {level!r} in reject; {nearest(level, REJECTION_LEVELS)}")
            if len(bounds) not in ((1, 2) if level.endswith("k1") else (1,)) or min(bounds) <= 0:
                wanted = "[lower, upper] or [upper]" if level.endswith("k1") else "[upper]"
                raise ValueError(f"reject.{level} is {bounds}, it must be {wanted}, positive")
            if len(bounds) == 2 and bounds[0] >= bounds[1]:
                raise ValueError(f"reject.{level} is {bounds}: the lower bound is not below the upper one")
            if level.endswith("k1") and len(bounds) == 1 and bounds[0] <= 1:
                raise ValueError(f"reject.{level} is {bounds}: an upper bound of the ratio must be above 1")
        return self

    @property
    def active(self) -> bool:
        """Whether anything is weighted or rejected."""
        return self.weights != "none" or bool(self.reject)


class FilterSection(Section):
    """Decides which groups are trained on. Other prompts replace groups that are dropped."""

    equal_rewards: bool = Field(
        False, description="Drop groups whose responses all have the same reward (DAPO's dynamic sampling)."
    )
    min_mean: float | None = Field(None, description="Drop groups whose mean (of filter.metric) is below this.")
    max_mean: float | None = Field(None, description="Drop groups whose mean (of filter.metric) is above this.")
    metric: str = Field(
        "reward",
        description="What the other keys of this section judge: reward, or a component that the reward function "
        "returns.",
    )
    max_rounds: PositiveInt = Field(
        10,
        description="Most rounds of drawing prompts for one step, the first included; after them the step trains on "
        "the groups it has.",
    )
    overlong: bool = Field(False, description="Give responses that were cut at rollout.max_response_tokens no loss.")

    @model_validator(mode="after")
    def _check_band(self) -> FilterSection:
        if self.min_mean is not None and self.max_mean is not None and self.min_mean >= self.max_mean:
            raise ValueError(f"min_mean {self.min_mean:g} is not below max_mean {self.max_mean:g}: no group passes")
        return self

    @property
    def active(self) -> bool:
        """Whether any group can be dropped."""
        return self.equal_rewards or self.min_mean is not None or self.max_mean is not None


class ReweightSection(Section):
    """Training on some responses of a step more than on others (PF-PPO, arXiv 2409.06957)."""

    method: Literal["pow", "max_min", "max_random"] = Field(
        description="pow: draw responses again, with replacement, in proportion to |score| ** power; max_min: keep "
        "the best and the worst response of every group; max_random: keep the best and a random other "
        "one."
    )
    power: float = Field(2.0, ge=0, description="The exponent of method pow.")


class AlgorithmSection(Section):
    """The algorithm: advantage, policy loss, aggregation and their values. The preset fills keys that are left out."""

    preset: str = Field(
        "grpo",
        description="Named set of values for the keys below; the table at the end of docs/configuration.md lists them.",
    )
    advantage: FunctionName = Field("grpo", description="Advantage estimator, or file.py:function.")
    normalize_by_std: bool = Field(
        True, description="Divide a group's advantages by the standard deviation of its rewards."
    )
    gamma: float = Field(
        1.0, ge=0, le=1, description="Discount factor: a reward that comes d tokens later counts gamma ** d."
    )
    lam: float = Field(
        1.0, ge=0, le=1, description="Lambda of GAE. 1: whole returns; 0: one-step differences of the values."
    )
    lam_critic: float = Field(1.0, ge=0, le=1, description="Lambda of the returns that the critic is trained on.")
    length_alpha: float | None = Field(
        None, gt=0, description="Lambda becomes 1 - 1 / (length_alpha x response length); unset: lam."
    )
    reward_weights: dict[str, float] | None = Field(
        None, description="Weight of each reward component, by its name; unset: 1 for all."
    )
    step_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of the step-level advantage, which compares steps that start from the same state.",
    )
    policy_loss: FunctionName = Field("ppo_clip", description="Per-token policy loss, or file.py:function.")
    clip_low: float = Field(0.2, ge=0, lt=1, description="The ratio is clipped below at 1 - clip_low.")
    clip_high: float = Field(0.2, ge=0, description="The ratio is clipped above at 1 + clip_high.")
    clip_dual: float | None = Field(
        None, gt=1, description="Bound c of the dual clip for negative advantages; unset: none."
    )
    tau_positive: float = Field(1.0, gt=0, description="Temperature of the gate where advantages are positive.")
    tau_negative: float = Field(1.05, gt=0, description="Temperature of the gate where they are not.")
    clip_cov_share: float = Field(
        2e-4,
        gt=0,
        lt=1,
        description="Share of the tokens whose loss is removed; they are drawn from the tokens whose covariance is "
        "between cov_low and cov_high.",
    )
    cov_low: float = Field(
        1.0,
        description="Least covariance of log-probability and advantage of the tokens that clip_cov_share draws from.",
    )
    cov_high: float = Field(
        5.0,
        description="Greatest covariance of log-probability and advantage of the tokens that clip_cov_share draws "
        "from.",
    )
    kl_cov_share: float = Field(
        2e-4,
        gt=0,
        lt=1,
        description="Share of the tokens that get a KL penalty: those with the highest covariance of log-probability "
        "and advantage.",
    )
    kl_cov_coef: float = Field(1.0, ge=0, description="Weight of the KL penalty on the tokens of kl_cov_share.")
    divergence_low: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Largest divergence from the old policy at which a token with a negative advantage still has a "
        "gradient.",
    )
    divergence_high: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Largest divergence from the old policy at which a token with a positive advantage still has a "
        "gradient.",
    )
    ratio_cap: float = Field(20.0, gt=1, description="Upper bound of the importance ratio.")
    dro_beta: float = Field(0.1, gt=0, description="Weight of the squared log-ratio.")
    topr_cap: float = Field(
        1.0, gt=0, description="Upper bound of the importance ratio of responses with negative advantages."
    )
    behaviour_cap: float | None = Field(
        None,
        gt=1,
        description="Tokens have no loss where the ratio of the policy at the start of the step to the sampler is "
        "above this; unset: no bound.",
    )
    sppo_eta: float = Field(
        1.0, gt=0, description="Eta of SPPO: the loss pulls a response's log-ratio to eta times its advantage."
    )
    aggregation: FunctionName = Field(
        "token-mean", description="How the losses of tokens are averaged or summed to one number, or file.py:function."
    )
    values: dict[str, float | int | bool | str | None] = Field(
        default_factory=dict, description="Values that your own functions (file.py:function) take, by name."
    )
    correction: CorrectionSection = CorrectionSection()
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    clip_value: float | None = Field(
        0.5,
        gt=0,
        description="Clip range of the value loss (PPO's value clip): a value that moves further than this within a "
        "step gains nothing; null: no clipping.",
    )
    value_coef: float = Field(0.1, ge=0, description="Weight of the value loss where the critic shares the trunk.")
    kl_reward_coef: float = Field(
        0.0,
        ge=0,
        description="Weight of the KL divergence from the reference model that is subtracted from every token's "
        "reward.",
    )
    kl_reward_estimator: str = Field("k1", description="Estimator of that divergence: k1, abs, k2, k3, k3_clamped.")
    kl_controller: Literal["fixed", "adaptive"] = Field(
        "fixed",
        description="fixed: kl_reward_coef stays constant; adaptive: it starts at its value, and is raised or lowered "
        "after every step to keep the KL divergence at kl_target.",
    )
    kl_target: float | None = Field(
        None, gt=0, description="KL divergence that the adaptive controller aims at, in nats per token."
    )
    kl_horizon: PositiveInt = Field(
        10_000,
        description="Number of responses over which the adaptive controller changes the weight by at most a fifth.",
    )
    kl_loss_coef: float = Field(
        0.0, ge=0, description="Weight of the KL divergence from the reference model in the loss."
    )
    kl_loss_estimator: str = Field(
        "k3",
        description="Estimator of that divergence: k1, abs, k2, k3, k3_clamped; with a plus sign, such as k3+, the "
        "value is that of the estimator and the gradient that of k2.",
    )
    old_logp: Literal["auto", "recompute", "rollout"] = Field(
        "auto",
        description="Log-probabilities in the denominator of the ratio. auto: the current policy's if a step makes "
        "one update, else recompute; recompute: those of a forward pass before the step's updates; "
        "rollout: the sampler's.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: object) -> object:
        return filled_from(values, PRESETS, default="grpo")

    @model_serializer(mode="wrap")
    def _without_unread(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return self._read(plain(self), (self.advantage, self.policy_loss, self.aggregation))

    @classmethod
    def settled(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """See `Section.settled`: without what the values' pieces do not take."""
        pieces = [str(values.get(piece, cls.model_fields[piece].default)) for piece in PIECES]
        return cls._read(values, pieces)

    @classmethod
    def taken_by(cls, key: str) -> str:
        """See `Section.taken_by`."""
        return either(USERS.get(key, ()))

    @staticmethod
    def _read(values: Mapping[str, Any], pieces: Sequence[str]) -> dict[str, Any]:
        taken = values_taken(*pieces)
        return {name: value for name, value in values.items() if name in taken or name not in USERS}

    @model_validator(mode="after")
    def _check_names(self) -> AlgorithmSection:
        for what, name, known in [
            ("advantage", self.advantage, ADVANTAGES),
            ("policy_loss", self.policy_loss, POLICY_LOSSES),
            ("aggregation", self.aggregation, AGGREGATIONS),
        ]:
            if name not in known and not is_function_reference(name):
                raise ValueError(f"unknown {what} {name!r}; {unknown_name(name, known)} (or give file.py:function)")
        for what, name in [
            ("kl_reward_estimator", self.kl_reward_estimator),
            ("kl_loss_estimator", self.kl_loss_estimator),
        ]:
            if name not in KL_ESTIMATORS:
                raise ValueError(f"unknown {what} {name!r}; {unknown_name(name, KL_ESTIMATORS)}")
        if self.cov_low >= self.cov_high:
            raise ValueError(
                f"cov_low {self.cov_low:g} is not below cov_high {self.cov_high:g}: no token is in the band"
            )
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities of the reference are used."""
        from_pieces = needs_of(self.advantage, ADVANTAGES), needs_of(self.policy_loss, POLICY_LOSSES)
        return bool(self.kl_reward_coef or self.kl_loss_coef) or any(n.needs_reference for n in from_pieces)
