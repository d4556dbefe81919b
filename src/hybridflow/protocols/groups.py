"""The rollouts of a prompt, as training takes them: Group -> Trajectory -> TokenSequence -> Turn.

A trajectory is what one sample of a policy made of a prompt. It has one sequence of tokens as long as its context only
grows; where history was rewritten, another sequence begins. A turn is what the model sampled for one request. A
response without an environment is a trajectory with one sequence and one turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hybridflow.protocols.generation import Result, Span, Support


@dataclass(slots=True)
class Turn:
    """Tokens ``start <= t < end`` of a sequence, sampled by the model for one request.

    Args:
        start: index of the first one in `TokenSequence.token_ids`.
        end: index behind the last one.
        finish_reason: why the turn ended: see `Result.finish_reason`.
        reward: the environment's reward for the turn; None: it gives none.
        anchor: the state in which the turn began, as a number that is equal for equal states; None: unknown.
        limit: most tokens that the request allowed.
        replica: which of the engine's replicas sampled it.
    """

    start: int
    end: int
    finish_reason: str
    reward: float | None = None
    anchor: int | None = None
    limit: int = 0
    replica: int = 0


@dataclass(slots=True)
class TokenSequence:
    """One growing context of a trajectory: what the model was shown first, and all that came after it.

    Args:
        prompt_ids: token ids of what the model was shown before the first turn.
        token_ids: the tokens behind them, sampled and observed ones.
        logps: log-probability of each of them: see `Result.logps`; 0 for those that were not sampled.
        spans: weight versions of the sampled tokens: see `Result.spans`.
        turns: which tokens the model sampled, in order.
        support: for each token, what it could have been: see `Result.support`.
        step_rewards: rewards of parts of the trajectory, each on the token (of `token_ids`) that its part ends with.
        fork: why the sequence began beside those before it; "" for the first one.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logps: list[float]
    spans: list[Span]
    turns: list[Turn]
    support: Support | None = None
    step_rewards: list[tuple[int, float]] = field(default_factory=list)
    fork: str = ""

    def sampled(self) -> list[bool]:
        """Returns for each token whether the model sampled it."""
        found = [False] * len(self.token_ids)
        for turn in self.turns:
            found[turn.start : turn.end] = [True] * (turn.end - turn.start)
        return found


@dataclass(slots=True)
class Trajectory:
    """A finished trajectory with its reward.

    Args:
        sample: which of the samples of its prompt this is.
        sequences: its sequences; none where it ended before its first turn, and then it trains nothing.
        finish_reason: why it ended: see `Result.finish_reason`; with an environment, see `docs/agents.md`.
        response: all that the model wrote, as text without special tokens.
        reward: the reward of the whole trajectory.
        components: further numbers of the reward, by name.
        failure: why there is no reward; None where there is one. The trajectory then carries no loss.
        messages: the whole conversation, with results of tools; empty without an environment.
        final: the text of the last turn; "" without an environment, where it is the response.
        counts: numbers that were counted and measured while it was made, by name.
    """

    sample: int
    sequences: list[TokenSequence]
    finish_reason: str
    response: str
    reward: float
    components: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    final: str = ""
    counts: dict[str, float] = field(default_factory=dict)

    @property
    def token_ids(self) -> list[int]:
        """The tokens that the model sampled, in order."""
        return [i for s in self.sequences for turn in s.turns for i in s.token_ids[turn.start : turn.end]]

    @property
    def logps(self) -> list[float]:
        """The log-probability of each of them."""
        return [p for s in self.sequences for turn in s.turns for p in s.logps[turn.start : turn.end]]

    @property
    def length(self) -> int:
        """The number of tokens that the model sampled."""
        return sum(turn.end - turn.start for turn in self.turns)

    @property
    def turns(self) -> list[Turn]:
        """The turns of all sequences, in order."""
        return [turn for s in self.sequences for turn in s.turns]


@dataclass(slots=True)
class Group:
    """All trajectories of one draw of a prompt.

    Args:
        draw: number of the draw, unique over the run.
        row: index of the row in the data.
        prompt_ids: token ids of the prompt, which the first sequence of each trajectory begins with.
        trajectories: the trajectories, in order of `sample`.
        baseline: the reward of a greedy response to the prompt; None where none was asked for.
        greedy: the sequences of that response, where the model acted.
        failures: how many of its responses (a greedy one too) the reward failed on, by what happened: see
            `Failure.kind`.
        left_out: trajectories in which the model acted, of a group that is dropped: a step that is made again
            as a whole plays them back.
        failed: why trajectories failed before they had a reward, one entry each.
        digest: a digest of the row, where an environment makes the prompt of it; "" elsewhere.
    """

    draw: int
    row: int
    prompt_ids: list[int]
    trajectories: list[Trajectory]
    baseline: float | None = None
    greedy: list[TokenSequence] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    left_out: list[Trajectory] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    digest: str = ""


def one_turn(prompt_ids: list[int], result: Result, limit: int) -> TokenSequence:
    """Returns the sequence of a response without an environment: all tokens behind the prompt are one turn.

    Args:
        prompt_ids: the prompt.
        result: the response.
        limit: most tokens that its request allowed.
    """
    turn = Turn(0, len(result.token_ids), result.finish_reason, limit=limit)
    return TokenSequence(prompt_ids, result.token_ids, result.logps, result.spans, [turn], result.support)
