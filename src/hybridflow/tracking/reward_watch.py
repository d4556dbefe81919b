"""Watches for rewards that rise for the wrong reason, and gives advice when the reward has risen and other metrics
disagree.

The level of a number is its median over `WINDOW` steps. Now is the last window; then is the oldest one of the last
`HORIZON` steps. The reward has risen when its level did by `RISE` of the span between the least and the greatest reward
seen, and by three times its usual change from step to step. What may then disagree:

- held-out reward: it fell beyond both confidence intervals, or stayed where it was while the training reward left it
  behind;
- length: responses are `LONGER` times as long or as short as they were, and among the responses to one prompt it is
  length that earns reward (a correlation of `PAID`); or the limit cuts `CUT` more of them;
- entropy: it fell to `COLLAPSED` of its old level while `MISSING` of the span of reward is still missing, and the
  reward rises no more;
- repetition within responses: the share of new pairs of tokens is `NEW` of what it was;
- one final answer: its share of the prompts for which it is not right grew by `SAME`;
- parts of the reward: one fell while the sum rose.

None of this proves a hack: a run that learns also shortens responses, loses entropy and gives more similar responses.
So each bound is far from what such runs do, a cause must last `STAYS` steps (held-out reward: evaluations), and the
advice comes once, and again only after the cause was absent for `RESTS`.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

WINDOW, HORIZON, STAYS, RESTS = 5, 100, 3, 20
RISE, LONGER, PAID, CUT, SAME = 0.1, 2.0, 0.8, 0.3, 0.3
COLLAPSED, MISSING = 0.1, 0.5  # of the entropy, and of the span: an honest run may stop short of the best, too
NEW = 0.6  # of the pairs of tokens that are new in their response
LEFT_BEHIND = 0.25  # of the span: how far the held-out reward must be behind to count as left behind
SCORE, LENGTH, CLIPPED, ENTROPY = (
    "critic/score/mean",
    "response_length/mean",
    "response_length/clip_ratio",
    "actor/entropy",
)
REPEATED, TOP, PULL = "rollout/seq_rep_2", "rollout/top_answer_share", "rollout/length_reward_corr"
CORRECTNESS = ("acc", "accuracy", "correct", "correctness")  # components that a right answer raises
LOOK = "read some of the best responses of this step (rollouts/, or the report)"


@dataclass(slots=True)
class Trend:
    """A number over the last steps that had it."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=HORIZON))

    @property
    def known(self) -> bool:
        """Whether two windows are there that do not overlap."""
        return len(self.values) >= 2 * WINDOW

    @property
    def then(self) -> float:
        """Its level in the oldest window."""
        return statistics.median(list(self.values)[:WINDOW])

    @property
    def now(self) -> float:
        """Its level in the newest window."""
        return statistics.median(list(self.values)[-WINDOW:])

    @property
    def change(self) -> float:
        """From then to now; 0 while there are too few steps to say."""
        return self.now - self.then if self.known else 0.0

    @property
    def unrest(self) -> float:
        """Its usual change from one step to the next."""
        values = list(self.values)
        return statistics.median(abs(b - a) for a, b in itertools.pairwise(values)) if len(values) > 1 else 0.0

    def said(self) -> str:
        """Returns both levels, for a sentence."""
        return f"{self.then:.3g} -> {self.now:.3g}"


@dataclass(frozen=True, slots=True)
class HeldOutReward:
    """A held-out reward with its confidence interval, and the training reward's level at that step."""

    held: float
    low: float
    high: float
    trained: float


class RewardWatch:
    """Takes the metrics of every step.

    Its state follows from them alone: a resumed run feeds it the recorded metrics.

    Args:
        parts: the weights of the reward's parts, by name (``reward.terms``), of those that are not 0.
    """

    def __init__(self, parts: Mapping[str, float] | None = None) -> None:
        self.parts = dict.fromkeys(CORRECTNESS, 1.0) | dict(parts or {})
        self.levels = {name: Trend() for name in (SCORE, LENGTH, CLIPPED, ENTROPY, REPEATED, TOP, PULL)}
        self.levels |= {f"reward/{name}/mean": Trend() for name in self.parts}
        self.spans: dict[str, tuple[float, float]] = {}
        self.evaluations: dict[str, list[HeldOutReward]] = {}
        self.lasting: dict[str, int] = {}  # for how many steps a cause has been present, or, with a minus sign, absent
        self.told: set[str] = set()

    def observe(self, metrics: Mapping[str, float]) -> str | None:
        """Returns advice after the step with these metrics, if there is any."""
        known = {name: float(value) for name, value in metrics.items() if _is_finite(value)}
        for name in self.levels.keys() & known.keys():
            self.levels[name].values.append(known[name])
        for name in ["critic/score", *(f"reward/{part}" for part in self.parts)]:
            if f"{name}/min" in known and f"{name}/max" in known:
                least, most = self.spans.get(name, (math.inf, -math.inf))
                self.spans[name] = min(least, known[f"{name}/min"]), max(most, known[f"{name}/max"])
        said = None
        looked = dict(self._causes()) if SCORE in known else {}
        for name in self._evaluated(known):
            looked[name] = self._held_out(name)
        for cause, sentence in looked.items():
            lasted = self.lasting.get(cause, 0)
            self.lasting[cause] = max(lasted, 0) + 1 if sentence else min(lasted, 0) - 1
            if self.lasting[cause] <= -RESTS:
                self.told.discard(cause)
            if said is None and sentence and self.lasting[cause] >= STAYS and cause not in self.told:
                self.told.add(cause)
                said = sentence
        return said

    # --- what disagrees ---

    def _causes(self) -> Iterator[tuple[str, str | None]]:
        score, rise = self.levels[SCORE], self._risen(SCORE)
        start = f"the reward rises ({SCORE} {score.said()}) while "
        for cause, find in [
            ("cut", self._cut),
            ("length", self._length),
            ("entropy", self._entropy),
            ("repeated", self._repeated),
            ("top", self._top),
            ("parts", self._parts),
        ]:
            found = find() if rise else None
            yield cause, start + found if found else None

    def _cut(self) -> str | None:
        clipped = self.levels[CLIPPED]
        if clipped.change >= CUT:
            return (
                f"the limit cuts more responses ({CLIPPED} {clipped.said()}): responses may be rewarded before they "
                f"end, or for not ending; {LOOK}, and set reward.overlong_buffer, or raise rollout.max_response_tokens"
            )
        return None

    def _length(self) -> str | None:
        length, pull = self.levels[LENGTH], self.levels[PULL]
        if not length.known or not pull.known:
            return None
        ratio = length.now / max(length.then, 1.0)
        paid = f"among the responses to one prompt length and reward go together ({PULL} {pull.now:.2f})"
        if ratio >= LONGER and pull.now >= PAID:
            return (
                f"responses grow ({LENGTH} {length.said()}), and {paid}: the reward may reward length itself; {LOOK}, "
                "and penalise it with reward.length_coef"
            )
        # Responses that the limit cut before, and that learn to end, become shorter and better.
        if ratio <= 1 / LONGER and pull.now <= -PAID and self.levels[CLIPPED].then < CUT:
            return (
                f"responses shrink ({LENGTH} {length.said()}), and {paid}: the reward may reward early ends; {LOOK}, "
                "and see what it gives to an empty response (hybridflow audit-reward)"
            )
        return None

    def _entropy(self) -> str | None:
        entropy, score = self.levels[ENTROPY], self.levels[SCORE]
        least, most = self.spans.get("critic/score", (0.0, 0.0))
        span, before = most - least, list(score.values)[: -2 * WINDOW]
        stalled = bool(before) and score.now - statistics.median(before[-WINDOW:]) < RISE / 2 * span
        if stalled and most - score.now > MISSING * span and entropy.known and entropy.now < COLLAPSED * entropy.then:
            return (
                f"the policy stops exploring ({ENTROPY} {entropy.said()}) far from the greatest reward ({most:.3g}): "
                f"it may have settled on one cheap way to be paid; {LOOK}, and lower optim.lr, or raise "
                "algorithm.clip_high or algorithm.entropy_coef"
            )
        return None

    def _repeated(self) -> str | None:
        repeated = self.levels[REPEATED]
        if repeated.known and 1 - repeated.now < NEW * (1 - repeated.then):
            return (
                f"responses repeat themselves ({REPEATED} {repeated.said()}): one phrase may be all that the reward "
                f"asks for; {LOOK}, and run hybridflow audit-reward"
            )
        return None

    def _top(self) -> str | None:
        top = self.levels[TOP]
        if top.change > SAME:
            return (
                f"different prompts get the same final answer ({TOP} {top.said()}): the reward may accept it whatever "
                f"was asked; {LOOK}, and run hybridflow audit-reward"
            )
        return None

    def _parts(self) -> str | None:
        fallen = [
            name for name in self.parts if self._risen(f"reward/{name}/mean", -math.copysign(1, self.parts[name]))
        ]
        if not fallen:
            return None
        worst, others = fallen[0], [f"reward/{name}/mean" for name in self.parts if name not in fallen]
        carrier = max(others, key=lambda name: self.levels[name].change, default=None)
        by = ""
        if carrier is not None and self.levels[carrier].change > 0:
            by = f" and {carrier} carries the rise ({self.levels[carrier].said()})"
        level = self.levels[f"reward/{worst}/mean"]
        return (
            f"a part of it gets worse (reward/{worst}/mean {level.said()}){by}: the policy may trade the one for the "
            f"other; {LOOK}, and change the weights of the parts"
        )

    def _risen(self, name: str, sign: float = 1.0) -> bool:
        """Returns whether a reward, or a part of it, is clearly above its old level; with sign -1, below."""
        level = self.levels[name]
        least, most = self.spans.get(name.removesuffix("/mean"), (0.0, math.inf))
        return level.known and sign * level.change > max(RISE * (most - least), 3 * level.unrest)

    # --- held-out reward ---

    def _evaluated(self, metrics: Mapping[str, float]) -> list[str]:
        """Takes this step's evaluations; returns their names."""
        names = [name for name in metrics if name.startswith("val-core/") and "/reward/mean@" in name]
        values = list(self.levels[SCORE].values)
        if not values:
            return []  # before training
        for name in names:
            aside = name.replace("val-core/", "val-aux/", 1)
            held, trained = metrics[name], statistics.median(values[-WINDOW:])
            bounds = metrics.get(f"{aside}/ci_low", held), metrics.get(f"{aside}/ci_high", held)
            self.evaluations.setdefault(name, []).append(HeldOutReward(held, *bounds, trained))
        return names

    def _held_out(self, name: str) -> str | None:
        past, now = self.evaluations[name][:-1], self.evaluations[name][-1]
        least, most = self.spans.get("critic/score", (0.0, math.inf))
        span, unrest = most - least, 3 * self.levels[SCORE].unrest
        best = max(past, key=lambda e: e.low, default=now)
        meaning = "it may learn the training rows, or what their reward overlooks"
        if now.trained - best.trained > max(RISE * span, unrest) and now.high < best.low:
            return (
                f"the reward rises ({SCORE} {best.trained:.3g} -> {now.trained:.3g}) while the held-out reward falls "
                f"({name} {best.held:.3g} -> {now.held:.3g}, intervals apart): {meaning}; compare responses in "
                "rollouts/ and evaluations/, and go back to the best step (checkpoint.best)"
            )
        for base in past:
            gained, kept = now.trained - base.trained, now.held - base.held
            behind = now.trained - now.held > LEFT_BEHIND * span
            if gained > max(LEFT_BEHIND * span, unrest) and kept < 0.2 * gained and behind:
                return (
                    f"the reward rises ({SCORE} {base.trained:.3g} -> {now.trained:.3g}) while the held-out reward "
                    f"stays ({name} {base.held:.3g} -> {now.held:.3g}): {meaning}; compare responses in rollouts/ and "
                    "evaluations/, and train on more or other rows"
                )
        return None


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
