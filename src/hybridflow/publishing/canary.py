"""The canary: the generation engine responds to a prompt and the trainer scores the response. Both must have the same
log-probabilities.

Where both sides compute in float32 their log-probabilities agree to `EXACT`, and a single tensor that was not updated
shows. Where one rounds to bfloat16 they differ by hundredths: the canary then shows a layer that is wrong or a cache
that is old, but no change as small as that of one optimizer step.

Shapes: B responses, T tokens of all prompts and responses, M tokens of the responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.batch import Batch
from hybridflow.devices import kind_of
from hybridflow.noise import NoiseKey, uniform
from hybridflow.protocols.generation import Request, Result, RolloutEngine, Sampling
from hybridflow.protocols.training import TrainEngine

ANSWER = 16  # tokens to generate
PROMPT, LONG = 64, 128  # tokens of a prompt: an engine without a prefix cache; all prompts but the first, at least
MOST_EMPTY = 100  # calls of `wait` in a row that return nothing
EXACT = 1e-3  # most that a log-probability may differ where both sides compute in float32
LOOSE = 0.25  # most that they may differ on average elsewhere, and
NOISE, FACTOR = 0.01, 5  # this many times what was measured at the start, which counts as this much at least


@dataclass(frozen=True)
class Gap:
    """By how much an engine's log-probabilities differ from the trainer's.

    Args:
        largest: of all tokens.
        mean: over all tokens.
        where: the largest, in words.
    """

    largest: float
    mean: float
    where: str


@dataclass(frozen=True)
class CanaryAnswer:
    """The response of an engine's replica to a prompt."""

    replica: int
    prompt_ids: tuple[int, ...]
    result: Result


@dataclass(kw_only=True)
class Canary:
    """Asks an engine for responses and scores them with the trainer.

    The engine must be awake and not paused. Requests may be in flight.

    Args:
        trainer: scores.
        rollout: the engine.
        tokens: token ids that prompts are made of, see `ordinary_tokens`.
        room: most tokens of a sequence in the engine.
        seed: the run's.
        exact: whether both sides compute in float32, see `computes_exactly`.
        keep: takes results of other requests.
    """

    trainer: TrainEngine
    rollout: RolloutEngine
    tokens: Sequence[int]
    room: int
    seed: int = 0
    exact: bool = True
    keep: Callable[[Sequence[Result]], None]
    limit: float = field(init=False)

    def __post_init__(self) -> None:
        self.limit = EXACT if self.exact else LOOSE

    def prompt(self, number: int = 0) -> tuple[int, ...]:
        """Makes one of many prompts. The first is a little longer than two blocks of the engine's prefix cache, where
        that fits.
        """
        block = self.rollout.cache_block
        usual = 2 * block + 3 if block else PROMPT
        length = max(1, min(max(usual, LONG) if number else usual, self.room - self._most()))
        drawn = uniform(NoiseKey(self.seed, "canary prompt", number), torch.arange(length)) * len(self.tokens)
        return tuple(self.tokens[int(i)] for i in drawn)

    def ask(self, version: int, numbers: Sequence[int] = (0,), *, tokens: int | None = None) -> list[CanaryAnswer]:
        """Returns the response of every replica to every prompt.

        Args:
            version: of the weights: responses to later versions are drawn with other noise.
            numbers: of the prompts.
            tokens: how many to generate; None: as many as usual.
        """
        replicas, sampling = self.rollout.replicas, Sampling(tokens or self._most())
        asked: dict[int, tuple[int, tuple[int, ...]]] = {}
        for number in numbers:
            prompt, noise = self.prompt(number), NoiseKey(self.seed, "canary", version, number)
            for place in range(replicas):
                request = Request(prompt, sampling, noise, replica=place if replicas > 1 else None)
                asked[self.rollout.submit(request)] = place, prompt
        found: dict[int, Result] = {}
        empty = 0  # an interruption that came too late for a trajectory ends a `wait` here
        while len(found) < len(asked):
            results = self.rollout.wait()
            empty = 0 if results else empty + 1
            assert empty < MOST_EMPTY, "the engine has lost the canary's requests"
            found |= {r.handle: r for r in results if r.handle in asked}
            self.keep([r for r in results if r.handle not in asked])
        return [CanaryAnswer(*where, found[handle]) for handle, where in asked.items()]

    def gap(self, answers: Sequence[CanaryAnswer]) -> Gap:
        """Compares the responses' log-probabilities with the trainer's."""
        prompts, results = [list(a.prompt_ids) for a in answers], [a.result for a in answers]
        batch = Batch.from_rows(
            {
                "input_ids_T": [p + r.token_ids for p, r in zip(prompts, results)],
                "loss_mask_T": [[False] * len(p) + [True] * len(r.token_ids) for p, r in zip(prompts, results)],
                "trajectory_B": list(range(len(results))),
            }
        )
        logp_M = self.trainer.score(batch, ["logp"])["logp"][batch["loss_mask_T"]]
        off_M = (logp_M.double() - torch.tensor([x for r in results for x in r.logps], dtype=torch.float64)).abs()
        off_M = off_M.nan_to_num(torch.inf)
        places = [(a.replica, place) for a in answers for place in range(len(a.result.token_ids))]
        replica, place = places[int(off_M.argmax())]
        of = f" of replica {replica}" if replica or any(a.replica for a in answers) else ""
        return Gap(float(off_M.max()), float(off_M.mean()), f"at token {place + 1} of the response{of}")

    def near(self, gap: Gap) -> bool:
        """Returns whether a gap is one that two engines with the same weights have."""
        return (gap.largest if self.exact else gap.mean) <= self.limit

    def settle(self, gap: Gap) -> None:
        """Lowers the limit, where one side rounds, to what this gap of an engine with the right weights allows."""
        if not self.exact:
            self.limit = min(LOOSE, FACTOR * max(gap.mean, NOISE))

    def _most(self) -> int:
        return min(ANSWER, self.room // 2)


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids of tokens that stand for text: neither special nor added ones (which may stand for images)."""
    other = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted({*tokenizer.get_vocab().values()} - other)


def computes_exactly(device: str, *dtypes: str) -> bool:
    """Returns whether a model with these data types computes in float32 there."""
    return "bfloat16" not in dtypes and kind_of(device).torch_type == "cpu"
