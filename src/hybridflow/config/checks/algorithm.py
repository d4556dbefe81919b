"""Checks that the pieces and values of an algorithm fit together, before anything runs.

Shapes: M scored tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator

from hybridflow.config.locate import is_function_reference
from hybridflow.config.pieces.needs import needs_of, signature_of
from hybridflow.config.pieces.presets import PRESETS
from hybridflow.config.pieces.tables import ADVANTAGES, POLICY_LOSSES, USERS, values_taken
from hybridflow.config.sections.algorithm import AlgorithmSection, FilterSection
from hybridflow.config.sections.base import either
from hybridflow.config.sections.model import CriticSection
from hybridflow.config.sections.rewards import RewardSection
from hybridflow.config.sections.train import RlTrainSection


def problems_of_algorithm(
    a: AlgorithmSection,
    train: RlTrainSection,
    *,
    critic: CriticSection | None,
    reference: str | None,
    filters: FilterSection,
) -> Iterator[str]:
    """Yields what does not fit in the algorithm, the critic and the reference of a run.

    Args:
        a: the algorithm.
        train: how much is trained.
        critic: the critic, where there is one.
        reference: ``model.reference``.
        filters: which groups are trained on.
    """
    wrong = [*_own_functions(a)]
    yield from wrong
    if not wrong:  # what a function needs is known from its signature
        yield from (*_unread_values(a), *_critic(a, critic), *_divergence(a), *_modes(a), *_correction(a))
    if critic is not None and train.steps is not None and critic.warmup_steps >= train.steps:
        yield f"critic.warmup_steps is {critic.warmup_steps}, but train.steps is {train.steps}: no actor is trained"
    if reference is not None and not a.needs_reference:
        yield "model.reference is set, but algorithm.kl_reward_coef and kl_loss_coef are 0: nothing uses it"
    if a.advantage == "distillation" and reference is None:
        yield "the distillation advantage holds every token against a teacher: name it in model.reference"
    if filters.active and train.epochs is not None:
        yield (
            "train.epochs counts passes over the rows, but a filter draws as many rows as it needs: give train.steps"
        )


def problems_of_reward(r: RewardSection, *, advantage: str, longest_answer: int) -> Iterator[str]:
    """Yields what in a reward does not fit an advantage estimator, or responses of at most this many tokens."""
    if r.overlong_buffer is not None and r.overlong_buffer > longest_answer:
        yield (
            f"reward.overlong_buffer is {r.overlong_buffer}, more than rollout.max_response_tokens {longest_answer}: "
            "every response would be punished"
        )
    normalized = [name for name, term in (r.terms or {}).items() if term.normalize == "group"]
    if normalized and needs_of(advantage, ADVANTAGES).needs_greedy:
        yield (
            f"reward.terms.{normalized[0]}.normalize is group, but {advantage} compares responses with a greedy one, "
            "which is scored alone: leave it out"
        )


def _unread_values(a: AlgorithmSection) -> Iterator[str]:
    """Yields values that were given and that none of the chosen pieces takes."""
    read = values_taken(a.advantage, a.policy_loss, a.aggregation)
    for name in sorted(set(a.values) - read):
        yield f"algorithm.values.{name} is set, but no function of your own takes a keyword-only parameter of that name"
    for name in sorted(USERS.keys() - read):
        value, default = getattr(a, name), type(a).model_fields[name].default
        if value not in (default, PRESETS[a.preset].get(name, default)):
            yield (
                f"algorithm.{name} is {value}, but neither the {a.advantage} advantage nor the {a.policy_loss} policy "
                f"loss uses it (it is for {either(USERS[name])})"
            )


def _critic(a: AlgorithmSection, critic: CriticSection | None) -> Iterator[str]:
    needed = needs_of(a.advantage, ADVANTAGES).needs_critic
    if needed and critic is None:
        yield f"the {a.advantage} advantage needs a critic: give a critic section (`critic: {{}}` is enough)"
    if critic is None:
        return
    if not needed:
        users = ", ".join(name for name, needs in ADVANTAGES.items() if needs.needs_critic)
        yield f"there is a critic section, but the {a.advantage} advantage uses no critic (these do: {users})"
    default = type(a).model_fields["value_coef"].default
    if not critic.shared_trunk and a.value_coef != default:
        yield "algorithm.value_coef is for a critic that shares the actor's trunk (critic.shared_trunk)"
    if critic.shared_trunk:
        for key in ("path", "lora", "optim", "epochs_per_step"):
            if getattr(critic, key) is not None:
                yield f"critic.{key} is set, but with critic.shared_trunk the critic is the actor's own model"
        if critic.warmup_steps:
            yield "critic.warmup_steps needs a critic of its own: with critic.shared_trunk they would move the actor"
        if not a.value_coef:
            yield "algorithm.value_coef is 0: with critic.shared_trunk the values would never be learnt"


def _divergence(a: AlgorithmSection) -> Iterator[str]:
    fields = type(a).model_fields
    for coef, keys in [
        ("kl_reward_coef", ("kl_reward_estimator", "kl_controller")),
        ("kl_loss_coef", ("kl_loss_estimator",)),
    ]:
        for key in keys:
            if not getattr(a, coef) and getattr(a, key) != fields[key].default:
                yield f"algorithm.{key} is {getattr(a, key)}, but algorithm.{coef} is 0: it changes nothing"
    if a.kl_controller == "adaptive" and a.kl_target is None:
        yield "algorithm.kl_controller adaptive needs algorithm.kl_target, the divergence to hold"
    if a.kl_controller == "fixed":
        for key in ("kl_target", "kl_horizon"):
            if getattr(a, key) != fields[key].default:
                yield f"algorithm.{key} is for algorithm.kl_controller adaptive; it is fixed"


def _modes(a: AlgorithmSection) -> Iterator[str]:
    modes = needs_of(a.policy_loss, POLICY_LOSSES).modes
    if modes and a.aggregation not in modes:
        yield (
            f"the {a.policy_loss} policy loss has no meaning with algorithm.aggregation={a.aggregation}; "
            f"set {' or '.join(modes)}"
        )


def _correction(a: AlgorithmSection) -> Iterator[str]:
    c = a.correction
    if c.mode == "bypass":
        if a.old_logp == "recompute":
            yield "algorithm.correction.mode=bypass takes the sampler's log-probabilities: leave out algorithm.old_logp"
        if c.weights != "none" and a.policy_loss != "reinforce" and not is_function_reference(a.policy_loss):
            yield (
                f"algorithm.correction weighs by {c.weights} in bypass mode, but the ratio of {a.policy_loss} to the "
                "sampler is that weight already: set algorithm.policy_loss=reinforce, or correction.weights=none"
            )
        if needs_of(a.policy_loss, POLICY_LOSSES).needs_rollout_logp:
            yield f"the {a.policy_loss} policy loss tells the step's first policy from the sampler: not in bypass mode"
    elif a.old_logp == "rollout" and (c.active or needs_of(a.policy_loss, POLICY_LOSSES).needs_rollout_logp):
        what = "algorithm.correction" if c.active else f"the {a.policy_loss} policy loss"
        yield f"{what} holds the step's first policy against the sampler: algorithm.old_logp=rollout makes them one"
    elif a.policy_loss == "decoupled_ppo" and c.weights != "none":
        yield (
            f"algorithm.correction weighs by {c.weights}, but the decoupled_ppo policy loss has these weights already: "
            "set algorithm.policy_loss=ppo_clip, or correction.weights=none"
        )
    if c.weights == "none" and (c.weight_floor is not None or c.normalize):
        yield "algorithm.correction has weight_floor or normalize, but its weights are none: they change nothing"


FORMS = {
    "advantage": "def mine(reward_N, group_N, *, my_value=1.0): an advantage per trajectory; or with mask_T: per token",
    "policy_loss": "def mine(logp_M, old_logp_M, advantage_M, *, my_value=1.0): (loss_M, {name: metric_M})",
    "aggregation": "def mine(length_N, group_N, *, norm): the weight of every token of a trajectory",
}
ENDINGS = {"advantage": ("_N", "_NK", "_T"), "policy_loss": ("_M",), "aggregation": ("_N",)}
PLAIN = {"advantage": ("offsets",), "policy_loss": (), "aggregation": ("norm",)}


def _own_functions(a: AlgorithmSection) -> Iterator[str]:
    """Yields what is wrong with the user's own functions, as far as their signatures show."""
    for what, endings in ENDINGS.items():
        name = getattr(a, what)
        if not is_function_reference(name):
            continue
        try:
            positional, keywords = signature_of(name)
        except ValueError as error:
            yield f"algorithm.{what}: {error}"
            continue
        strange = [p for p in positional if not p.endswith(endings) and p not in PLAIN[what]]
        given = (*a.values, *type(a).model_fields, *PLAIN[what])
        unknown = [k for k, has_default in keywords.items() if not has_default and k not in given]
        if what == "policy_loss" and "logp_M" not in positional:
            yield f"algorithm.{what}: {name} does not take logp_M, so it has no gradient; write {FORMS[what]}"
        if strange:
            yield f"algorithm.{what}: {name} takes {strange[0]!r}, and nothing is called that; write {FORMS[what]}"
        for key in unknown:
            yield f"algorithm.{what}: {name} takes {key!r}: give it a default, or algorithm.values.{key}"
