"""The rollouts of a prompt: its responses with their rewards, as training takes them."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybridflow.protocols.generation import Span, Support


@dataclass(slots=True)
class Trajectory:
    """A finished response with its reward.

    Args:
        sample: which response to its prompt this is.
        token_ids: generated tokens.
        logps: see `Result.logps`.
        finish_reason: see `Result.finish_reason`.
        spans: see `Result.spans`.
        response: the tokens as text, without special tokens.
        reward: the reward of the whole response.
        support: see `Result.support`.
        components: further numbers of the reward, by name.
        step_rewards: rewards of parts of the response, each on the token (of `token_ids`) that its part ends with.
        failure: why there is no reward; None where there is one. The response then carries no loss.
    """

    sample: int
    token_ids: list[int]
    logps: list[float]
    finish_reason: str
    spans: list[Span]
    response: str
    reward: float
    support: Support | None = None
    components: dict[str, float] = field(default_factory=dict)
    step_rewards: list[tuple[int, float]] = field(default_factory=list)
    failure: str | None = None


@dataclass(slots=True)
class Group:
    """All responses to one draw of a prompt.

    Args:
        draw: number of the draw, unique over the run.
        row: index of the row in the data.
        prompt_ids: token ids of the prompt.
        trajectories: the responses, in order of `sample`.
        baseline: the reward of a greedy response to the prompt; None where none was asked for.
        failures: how many of its responses (a greedy one too) the reward failed on, by what happened: see
            `Failure.kind`.
    """

    draw: int
    row: int
    prompt_ids: list[int]
    trajectories: list[Trajectory]
    baseline: float | None = None
    failures: dict[str, int] = field(default_factory=dict)
