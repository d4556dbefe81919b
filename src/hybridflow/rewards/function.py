"""A user's reward function, called safely: what it returns is checked before anything is trained on it."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybridflow.config.locate import load_function
from hybridflow.errors import UserError, nearest
from hybridflow.rewards import REWARDS

SINGLE = ("response", "ground_truth", "prompt", "row")
_FORMS = (
    "def score(response: str, ground_truth) -> float, with any of the arguments response, ground_truth, prompt, row; "
    "or def score(responses: list[str], ...) -> list[float] for a whole group; a dict of numbers with 'score' among "
    "them may stand for a number"
)


class RewardFunction:
    """Scores the answers to one prompt.

    The function's own argument names decide what it is given: ``response`` (text of one answer) or ``responses`` (of
    all), ``ground_truth`` (the row's), ``prompt`` (chat messages) and ``row`` (the whole row).

    Args:
        function: the user's function.
        name: how to call it in messages.

    Raises:
        UserError: the function wants arguments that do not exist.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name
        parameters = inspect.signature(function).parameters
        self.whole_group = "responses" in parameters
        known = ("responses" if self.whole_group else "response", *SINGLE[1:])
        needed = [
            n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        unknown = [n for n in needed if n not in known]
        if unknown or known[0] not in parameters:
            missing = f"does not take {known[0]!r}" if known[0] not in parameters else ""
            strange = f"wants {unknown[0]!r} ({nearest(unknown[0], known)})" if unknown else ""
            raise UserError(
                f"the reward {name} {' and '.join(filter(None, [strange, missing]))}", fix=f"write {_FORMS}"
            )
        self.arguments = [n for n in known if n in parameters]

    def __call__(
        self, responses: Sequence[str], *, ground_truth: Any, prompt: list[dict[str, Any]], row: dict[str, Any]
    ) -> list[float | dict[str, float]]:
        """One finite number per answer, or finite numbers by name, of which "score" is the reward.

        Raises:
            UserError: the function raised, or returned something else.
        """
        context = {"ground_truth": ground_truth, "prompt": prompt, "row": row}
        if not self.whole_group:
            return [self._reward(self._call(context | {"response": r}), r) for r in responses]
        scores = self._call(context | {"responses": list(responses)})
        if not isinstance(scores, Sequence) or isinstance(scores, str) or len(scores) != len(responses):
            found = f"{len(scores)} scores" if isinstance(scores, list | tuple) else f"a {type(scores).__name__}"
            raise UserError(
                f"the reward {self.name} was given {len(responses)} responses and returned {found}",
                fix="return a list with one number for each response, in their order",
            )
        return [self._reward(s, r) for s, r in zip(scores, responses)]

    def _call(self, context: dict[str, Any]) -> Any:
        try:
            return self.function(**{n: context[n] for n in self.arguments})
        except Exception as error:
            shown = context.get("response", context.get("responses"))
            raise UserError(
                f"the reward {self.name} raised {type(error).__name__}: {error}",
                why=f"it was scoring {str(shown)[:200]!r} against {context['ground_truth']!r}",
                fix="make it return a number for every answer, however malformed",
            ) from error

    def _reward(self, value: Any, response: str) -> float | dict[str, float]:
        if not isinstance(value, Mapping):
            return self._number(value, response)
        if "score" not in value:
            raise UserError(
                f"the reward {self.name} returned a dict without 'score' in it: {dict(value)!r}"[:300],
                fix="name the reward itself 'score'; the others are its components",
            )
        return {str(name): self._number(number, response) for name, number in value.items()}

    def _number(self, value: Any, response: str) -> float:
        if isinstance(value, numbers.Real) and math.isfinite(value):
            return float(value)
        raise UserError(
            f"the reward {self.name} returned {value!r} ({type(value).__name__}), not a finite number",
            why=f"it was scoring {response[:200]!r}",
            fix=f"write {_FORMS}",
        )


def score_of(reward: float | Mapping[str, float]) -> float:
    """The reward itself, of a number or of numbers by name."""
    return reward["score"] if isinstance(reward, Mapping) else reward


def load_reward(reference: str) -> RewardFunction:
    """The reward that ``file.py:function`` or the name of a built-in one means.

    Raises:
        UserError: no such function, or one with arguments that do not exist.
    """
    return RewardFunction(REWARDS[reference] if reference in REWARDS else load_function(reference), reference)
