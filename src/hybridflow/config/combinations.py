"""Which pieces and values of an algorithm go together: what does not is refused before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hybridflow.config.algorithms import ADVANTAGES, POLICY_LOSSES, PRESETS

if TYPE_CHECKING:  # the sections check themselves with this file
    from hybridflow.config.learning import AlgorithmSection
    from hybridflow.config.sections import CriticSection, RlConfig


def check_algorithm(config: RlConfig) -> None:
    """Holds the algorithm, the critic and the reference of a run together.

    Raises:
        ValueError: they do not fit; all that is wrong is told at once.
    """
    problems = [
        *_unread_values(config.algorithm),
        *_critic(config.algorithm, config.critic),
        *_divergence(config.algorithm),
    ]
    critic, steps = config.critic, config.train.steps
    if critic is not None and steps is not None and critic.warmup_steps >= steps:
        problems.append(
            f"critic.warmup_steps is {critic.warmup_steps}, but train.steps is {steps}: no actor is trained"
        )
    if config.model.reference is not None and not config.algorithm.needs_reference:
        problems.append("model.reference is set, but algorithm.kl_reward_coef and kl_loss_coef are 0: nothing uses it")
    if problems:
        raise ValueError("; ".join(problems))


def _unread_values(a: AlgorithmSection) -> Iterator[str]:
    """Values that were given and that none of the chosen pieces takes."""
    read = {*ADVANTAGES[a.advantage].values, *POLICY_LOSSES[a.policy_loss].values}
    every = {name for table in (ADVANTAGES, POLICY_LOSSES) for needs in table.values() for name in needs.values}
    for name in sorted(every - read):
        value, default = getattr(a, name), type(a).model_fields[name].default
        if value not in (default, PRESETS[a.preset].get(name, default)):
            yield (
                f"algorithm.{name} is {value}, but neither the {a.advantage} advantage nor the {a.policy_loss} policy "
                "loss uses it"
            )


def _critic(a: AlgorithmSection, critic: CriticSection | None) -> Iterator[str]:
    needed = ADVANTAGES[a.advantage].needs_critic
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
