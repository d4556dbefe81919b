"""Rewards: what the function's argument names ask for it gets, and what it returns is checked."""

from __future__ import annotations

import asyncio
import functools
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridflow.config.bounds import LARGEST_REWARD
from hybridflow.errors import UserError
from hybridflow.groups.failures import FailurePolicy
from hybridflow.protocols.rewards import Answers, Score, total
from hybridflow.rewards.graders.composed import Part, combined
from hybridflow.rewards.graders.function import FIXES, RewardFunction, load_reward, name_of, read_score
from hybridflow.rewards.graders.in_process import InProcessGrader

ROW = {"prompt": "1+1=", "ground_truth": "2", "level": 3, "data_source": "sums", "extra_info": {"index": 7}}


def answers(*responses: str, row: dict[str, Any] = ROW) -> Answers:
    return Answers(list(responses), "2", [{"role": "user", "content": "1+1="}], row)


def values(function: Any, *responses: str, **kwargs: Any) -> list[float]:
    scores = RewardFunction(function, "mine", kwargs).scores(answers(*responses))
    assert not any(s.failure for s in scores), scores
    return [s.value for s in scores]


def failed(function: Any, *responses: str) -> Score:
    """The score of the last answer."""
    score = RewardFunction(function, "mine").scores(answers(*responses))[-1]
    assert score.failure is not None and score.value == 0 and score.kind in FIXES
    return score


def refused(function: Any, **kwargs: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        RewardFunction(function, "mine", kwargs)
    return caught.value


def test_a_function_gets_what_its_arguments_name() -> None:
    seen: list[Any] = []

    def all_of_it(response: str, ground_truth: str, prompt: Any, row: Any, data_source: str) -> int:
        seen.append((response, ground_truth, prompt[0]["content"], row["level"], data_source))
        return len(seen)

    assert values(all_of_it, "a", "b") == [1.0, 2.0]
    assert seen == [("a", "2", "1+1=", 3, "sums"), ("b", "2", "1+1=", 3, "sums")]
    assert values(lambda response: response == "2", "2", "3") == [1.0, 0.0]
    assert values(lambda response, bonus=0.5: bonus, "2") == [0.5]
    assert values(lambda response, **rest: float(not rest), "2") == [1.0]


def test_a_group_is_scored_in_one_call() -> None:
    def ranks(responses: list[str], ground_truth: str) -> list[float]:
        return [sorted(responses).index(r) / len(responses) + len(ground_truth) for r in responses]

    assert values(ranks, "b", "c", "a", "d") == [1.25, 1.5, 1.0, 1.75]
    assert values(lambda responses: torch.tensor([0.5, 1.0]), "a", "b") == [0.5, 1.0]
    assert values(lambda responses: np.array([1, 2]), "a", "b") == [1.0, 2.0]


def test_what_was_written_for_verl_works_as_it_is() -> None:
    def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):  # type: ignore[no-untyped-def]
        assert isinstance(extra_info, dict)
        right = solution_str == ground_truth
        return {"score": 1.0 if right else -1.0, "acc": right, "pred": solution_str, "at": extra_info.get("index", -1)}

    reward = RewardFunction(compute_score, "verl")
    right, wrong = reward.scores(answers("2", "3"))
    assert (right.value, right.components) == (1.0, {"acc": 1.0, "at": 7.0})
    assert (wrong.value, wrong.components) == (-1.0, {"acc": 0.0, "at": 7.0})
    (score,) = reward.scores(answers("2", row={"ground_truth": "2"}))  # no extra_info: {}; no data_source: None
    assert score.components["at"] == -1.0

    def batch(data_sources, solution_strs, ground_truths, extra_infos, **kwargs):  # type: ignore[no-untyped-def]
        assert data_sources == ["sums"] * 3 and [e["index"] for e in extra_infos] == [7] * 3
        return [float(s == t) * kwargs["scale"] for s, t in zip(solution_strs, ground_truths)]

    assert values(batch, "2", "3", "2", scale=2.0) == [2.0, 0.0, 2.0]

    async def later(data_source, solution_str, ground_truth, extra_info):  # type: ignore[no-untyped-def]
        await asyncio.sleep(0)
        return float(solution_str == ground_truth)

    assert values(later, "2", "3") == [1.0, 0.0]


def test_what_was_written_for_trl_works_as_it_is() -> None:
    def kept(prompts, completions, level, **kwargs):  # type: ignore[no-untyped-def]
        assert prompts == [asked.written] * 2 and level == [3, 3] and kwargs["data_source"] == ["sums"] * 2
        assert "prompt" not in kwargs and kwargs["ground_truth"] == ["2", "2"]
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        assert all(isinstance(c, str) or c == [{"role": "assistant", "content": t}] for c, t in zip(completions, texts))
        return [float(t == "2") for t in texts]

    asked = replace(answers("2", "3"), written="1+1=")  # a string stays one, and so do the completions
    assert [s.value for s in RewardFunction(kept, "trl").scores(asked)] == [1.0, 0.0]
    asked = replace(asked, written=asked.prompt)
    assert [s.value for s in RewardFunction(kept, "trl").scores(asked)] == [1.0, 0.0]

    class Length:  # as TRL's own classes are, with a name for its metrics
        __name__ = "length"

        def __call__(self, completions: list[Any], ground_truth: list[str], trainer_state: Any = None) -> list[int]:
            return [len(c[0]["content"]) + len(t) for c, t in zip(completions, ground_truth)]

        async def later(self, completions: list[Any], *, scale: float) -> list[float]:
            return [scale for _ in completions]

    assert values(Length(), "a", "bcd") == [2.0, 4.0]
    assert values(functools.partial(Length().later, scale=3.0), "a", "b") == [3.0, 3.0]
    assert values(Length().later, "a", scale=2.0) == [2.0]
    half = RewardFunction(lambda completions: [None if c[0]["content"] == "a" else 1.0 for c in completions], "half")
    assert [(s.value, s.applies, s.failure) for s in half.scores(answers("a", "b"))] == [
        (0.0, False, None),
        (1.0, True, None),
    ]
    assert failed(lambda responses: [None], "a").kind == "nonsense"


def test_a_reward_of_trls_form_gets_token_ids_where_there_are_any() -> None:
    def counts(completions: list[Any], completion_ids: list[list[int]]) -> list[int]:
        return [len(ids) for ids in completion_ids]

    asked = replace(answers("a", "b"), token_ids=[[5, 6], [7]])
    for function in (
        counts,
        lambda completions, **given: counts(completions, given["completion_ids"]),
        lambda completion_ids, **given: counts(given["completions"], completion_ids),  # as TRL's length penalties are
        lambda prompts, **given: counts(prompts, given["completion_ids"]),
    ):
        assert [s.value for s in RewardFunction(function, "counts").scores(asked)] == [2.0, 1.0]
    assert "texts that have no token ids" in str(failed(counts, "a").failure)


def test_a_reward_of_trls_form_is_told_which_column_it_lacks() -> None:
    score = failed(lambda completions, lvel: [1.0], "a")
    assert score.kind == "columns"
    assert "wants 'lvel', which is no column of the row: did you mean 'level'?" in str(score.failure)
    assert values(lambda completions, other=(): [float(len(other))], "a") == [0.0]
    assert FailurePolicy(advice=FIXES).refuse(score.failure, "row 0").fix.endswith("or give the argument a default")
    assert "wants 'trainer_state', which TRL's trainer alone has" in refused(lambda completions, trainer_state: 1).what
    assert "does not take it" in refused(lambda completions: [1.0], bonus=1).what


def acted(*turns: str, prompt: str = "1+1=") -> Answers:
    """A trajectory of a model that calls a tool in every turn but the last."""
    told = [{"role": "user", "content": prompt}]
    for number, text in enumerate(turns):
        call = {"id": f"call{number}", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
        last = number == len(turns) - 1
        told.append({"role": "assistant", "content": text} | ({} if last else {"tool_calls": [call]}))
        if not last:
            told.append({"role": "tool", "tool_call_id": f"call{number}", "content": "it is 2"})
    found = [
        {"text": text, "reward": 0.5 if i else None, "calls": int(i < len(turns) - 1)} for i, text in enumerate(turns)
    ]
    return replace(answers("\n".join(turns)), finals=[turns[-1]], conversations=[told], turns=[found], written="1+1=")


def test_a_reward_of_a_model_that_acted_gets_its_turns() -> None:
    """What the model wrote is apart from what tools wrote; TRL's completions have both, as messages."""
    seen: dict[str, Any] = {}

    def mine(response: str, final: str, messages: Any, turns: Any, extra_info: Any) -> Any:
        seen.update(locals())
        messages.clear()  # stays with the function
        return {"score": 1.0, "turns": [(0, 0.25), (1, turns[1]["reward"])]}

    def trl(prompts: Any, completions: Any) -> list[float]:
        seen.update(locals())
        return [float(message["role"] == "tool" and message["content"] == "it is 2") for (_, message, _) in completions]

    given = acted("I add", "so 2")
    (score,) = RewardFunction(mine, "mine").scores(given)
    assert (score.value, score.turns, total(score)) == (1.0, ((0, 0.25), (1, 0.5)), 1.75)
    assert (seen["response"], seen["final"]) == ("I add\nso 2", "so 2")
    assert seen["extra_info"] == {"index": 7, "num_turns": 2}
    assert [turn["calls"] for turn in seen["turns"]] == [1, 0]
    assert RewardFunction(trl, "trl").scores(given) == [Score(1.0)]
    assert seen["prompts"] == [[{"role": "user", "content": "1+1="}]]
    assert [message["role"] for message in seen["completions"][0]] == ["assistant", "tool", "assistant"]
    assert seen["completions"][0][0]["tool_calls"][0]["function"]["name"] == "add"
    # A trajectory that ended before its first turn has no completion.
    nothing = replace(given, responses=[""], finals=[""], conversations=[given.prompt], turns=[[]])
    RewardFunction(lambda prompts, completions: [0.0], "trl").scores(nothing)
    assert RewardFunction(lambda completions: [float(len(completions[0]))], "trl").scores(nothing) == [Score(0.0)]


def test_built_in_rewards_judge_the_last_turn_and_the_environments_its_turns() -> None:
    """An answer before a call is none: the model has written another turn since."""
    for turns, expected in {("#### 2", "#### 3"): 0.0, ("#### 3", "#### 2"): 1.0, ("#### 2", "done"): 0.0}.items():
        assert [s.value for s in load_reward("gsm8k").scores(acted(*turns))] == [expected]
    own = load_reward("environment").scores(acted("I add", "so 2"))
    assert own == [Score(0.0, turns=((1, 0.5),))]
    parts = [Part("right", None, weight=2.0), Part("world", None, weight=0.5)]  # type: ignore[arg-type]
    (both,) = combined(parts, [load_reward("gsm8k").scores(acted("add", "#### 2")), own])
    assert (both.value, both.turns, both.components) == (2.0, ((1, 0.25),), {"right": 1.0, "world": 0.5})


@pytest.mark.parametrize("turns", [[(2, 1.0)], [(-1, 1.0)], [(0.0, 1.0)], [(0, "a")], [1.0]])
def test_rewards_of_turns_name_turns_that_there_are(turns: Any) -> None:
    (score,) = RewardFunction(lambda response: {"score": 0.0, "turns": turns}, "mine").scores(acted("I add", "so 2"))
    assert score.kind == "nonsense" and "turn" in str(score.failure)


def test_what_a_function_does_to_extra_info_does_not_stay() -> None:
    def spoil(solution_str: str, extra_info: dict[str, Any]) -> float:
        extra_info["seen"] = extra_info.get("seen", 0) + 1
        return float(extra_info["seen"])

    assert values(spoil, "a", "b", "c") == [1.0, 1.0, 1.0]


def test_async_functions_of_one_group_are_in_flight_together() -> None:
    arrived = asyncio.Event()
    inside: list[str] = []

    async def meet(response: str) -> float:
        inside.append(response)
        if len(inside) == 3:
            arrived.set()
        await asyncio.wait_for(arrived.wait(), 10)
        return float(response)

    class Judge:
        async def __call__(self, responses: list[str]) -> list[float]:
            return [len(r) for r in responses]

    assert values(meet, "1", "2", "3") == [1.0, 2.0, 3.0]
    assert values(Judge(), "a", "bb") == [1.0, 2.0]


@pytest.mark.parametrize(
    "value",
    [1, True, 0.5, -3, np.float32(0.5), np.int64(2), np.float64(0.25), np.bool_(True), np.ones(1), Fraction(1, 4),
     torch.tensor(1.5), torch.tensor([2])],
)  # fmt: skip
def test_every_kind_of_number_will_do(value: Any) -> None:
    (score,) = RewardFunction(lambda response: value, "mine").scores(answers("x"))
    assert type(score.value) is float and score.value == value and score.failure is None


@pytest.mark.parametrize(
    "value",
    [None, "1", float("nan"), float("inf"), -float("inf"), 1j, np.float32("nan"), np.complex64(1), torch.tensor(1j),
     torch.tensor(float("nan")), 10**400, b"1", {1}],
)  # fmt: skip
def test_what_is_no_number_is_a_failure_of_that_answer_alone(value: Any) -> None:
    score = failed(lambda response: value, "good answer")
    shown = repr(value)[:200]
    assert score.kind == "nonsense" and score.failure is not None
    assert f"the reward mine returned {shown}"[:180] in score.failure.what and "'good answer'" in score.failure.scoring
    assert "def score(response: str" in FIXES["nonsense"]
    fine, bad = RewardFunction(lambda responses: [1.0, value], "mine").scores(answers("fine", "good answer"))
    assert (fine, bad.kind) == (Score(1.0), "nonsense")


@pytest.mark.parametrize("value", [[0.1, 0.2], (1.0, "because"), [1.0], np.ones(3), torch.ones(2, 2)])
def test_several_numbers_for_one_answer_are_told_how_steps_are_given(value: Any) -> None:
    score = failed(lambda response: value, "x")
    assert score.failure is not None and score.kind == "nonsense"
    assert "'steps': [(characters" in FIXES["nonsense"] and "not a finite number" in score.failure.what


def test_steps_are_characters_and_rewards() -> None:
    def steps(response: str) -> dict[str, Any]:
        return {"score": 1, "steps": [(2, 0.5), [np.int64(len(response)), torch.tensor(-1.0)]], "lines": 2}

    (score,) = RewardFunction(steps, "mine").scores(answers("1+1=2"))
    assert (score.value, score.steps, score.components) == (1.0, ((2, 0.5), (5, -1.0)), {"lines": 2.0})
    for wrong in [(0, 1.0), (6, 1.0), (True, 1.0), (2.0, 1.0), (2, float("nan")), 3, (1, 2, 3), "ab"]:
        score = failed(lambda response, wrong=wrong: {"score": 1.0, "steps": [wrong]}, "1+1=2")
        assert score.kind == "nonsense", wrong


def test_a_dict_needs_a_score_and_its_numbers_must_be_finite() -> None:
    assert "a dict without 'score' in it: {'reward': 1.0}" in str(failed(lambda response: {"reward": 1.0}, "x").failure)
    assert "returned None (NoneType) as 'score'" in str(failed(lambda response: {"score": None}, "x").failure)
    assert "returned nan (float) as 'format'" in str(
        failed(lambda response: {"score": 1.0, "format": float("nan")}, "x").failure
    )


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([1.0], "1 scores"),
        ([1.0] * 3, "3 scores"),
        ((), "0 scores"),
        (0.5, "a float"),
        ("12", "a str"),
        (None, "a NoneType"),
        ({0: 1.0, 1: 2.0}, "a dict"),
        (np.ones(3), "3 scores"),
    ],
)
def test_a_group_needs_as_many_scores_as_answers(value: Any, found: str) -> None:
    scores = RewardFunction(lambda responses: value, "mine").scores(answers("a", "b"))
    assert [s.kind for s in scores] == ["nonsense"] * 2
    assert f"the reward mine was given 2 responses and returned {found} (it was scoring 2 responses" in str(
        scores[0].failure
    )


def test_a_reward_that_raises_shows_the_answer() -> None:
    fine, bad = RewardFunction(lambda response: {"a": 1.0}[response], "mine").scores(
        answers("a", "strange " + 5000 * "x")
    )
    assert fine == Score(1.0) and bad.kind == "raised" and bad.failure is not None
    assert bad.failure.what.startswith("the reward mine raised KeyError: 'strange xxx")
    assert bad.failure.scoring.startswith("'strange xxx") and str(bad.failure).endswith("against '2')")
    assert len(str(bad.failure)) < 800  # three texts of 200 characters, a line of code and names


class Hostile:
    """Nothing about it works."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __len__(self) -> int:
        raise RuntimeError("no len")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


@pytest.mark.parametrize("error", [SystemExit(0), MemoryError(), RecursionError("deep"), GeneratorExit()])
def test_nothing_that_a_function_raises_ends_the_run(error: BaseException) -> None:
    def score(response: str) -> float:
        raise error

    assert failed(score, "x").kind == "raised"
    assert failed(lambda response: Hostile(), "x").failure
    assert failed(lambda responses: Hostile(), "x").failure


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            lambda answer: 1.0,
            "wants 'answer' (the text of the response is 'response'; a column of the data is row['answer']) and does "
            "not take 'response'",
        ),
        (
            lambda completion: 1.0,
            "wants 'completion' (here it is 'response'; a column of the data is row['completion']) and does not "
            "take 'response'",
        ),
        (
            lambda response, gold: 1.0,
            "wants 'gold' (here it is 'ground_truth'; a column of the data is row['gold'])",
        ),
        (lambda response, level: 1.0, "wants 'level' (a column of the data is row['level'])"),
        (lambda response, ground_thruth: 1.0, "wants 'ground_thruth' (did you mean 'ground_truth'?)"),
        (lambda ground_truth: 1.0, "does not take 'response'"),
        (lambda responses, response: 1.0, "wants 'response' (did you mean 'responses'?)"),
        (lambda data_sources, solution_str: 1.0, "wants 'data_sources' (did you mean 'data_source'?)"),
        (lambda response, /: 1.0, "takes 'response' by position only"),
        (lambda: 1.0, "does not take 'response'"),
    ],
)
def test_a_signature_that_is_none_is_refused_before_any_call(function: Any, expected: str) -> None:
    error = refused(function)
    assert error.what == f"the reward mine {expected}"
    assert "or def score(responses: list[str], ...)" in error.fix


def test_further_arguments_must_be_taken() -> None:
    assert values(lambda response, weight: weight, "x", weight=0.5) == [0.5]
    assert values(lambda response, **rest: rest["weight"], "x", weight=0.5) == [0.5]
    assert values(functools.partial(lambda response, a, b: a + b, a=1), "x", b=2) == [3.0]
    error = refused(lambda response, weight=1.0: weight, wieght=0.5)
    assert error.what == "reward.kwargs has 'wieght', and the reward mine does not take it"
    assert error.fix == "did you mean 'weight'?"
    error = refused(lambda response, ground_truth: 1.0, ground_truth="4")
    assert error.what == "reward.kwargs has 'ground_truth', and the reward mine is given that by the run"


def test_a_reward_is_found_by_file_and_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def half(response, of=1.0):\n    return of / 2\n")
    assert load_reward(f"{tmp_path}/mine.py:half").scores(answers("x")) == [Score(0.5)]
    assert load_reward(f"{tmp_path}/mine.py:half", {"of": 3}).scores(answers("x")) == [Score(1.5)]
    with pytest.raises(UserError, match="has no function 'hafl'") as caught:
        load_reward(f"{tmp_path}/mine.py:hafl")
    assert caught.value.fix == "did you mean 'half'?"


RAISING = """
import asyncio, functools, json
from dataclasses import dataclass

def own(response):
    return 1 / 0  # own

def batch(responses):
    return [len(r) / 0 for r in responses]  # batch

async def later(response):
    await asyncio.sleep(0)
    return {}["later"]

def of_a_library(response):
    return json.loads(response)  # of_a_library

def deep(response):
    return _helper(response)

def _helper(response):
    raise ValueError(\"\"\"two
lines\"\"\")  # _helper

@dataclass
class Judge:
    def __call__(self, response):
        return response["x"]  # __call__

judge = Judge()
part = functools.partial(own)
"""


@pytest.mark.parametrize(
    ("name", "line", "where", "said"),
    [
        ("own", 6, "own: return 1 / 0  # own", "ZeroDivisionError: division by zero"),
        ("batch", 9, "<listcomp>: ", "ZeroDivisionError: division by zero"),
        ("later", 13, 'later: return {}["later"]', "KeyError: 'later'"),
        ("of_a_library", 16, "of_a_library: return json.loads(response)", "JSONDecodeError: Expecting value"),
        ("deep", 22, "_helper: raise ValueError", "ValueError: two lines"),
        ("judge", 28, '__call__: return response["x"]', "TypeError: string indices"),
        ("part", 6, "own: return 1 / 0  # own", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_reward_that_raises_shows_file_line_and_code(
    name: str, line: int, where: str, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RAISING)
    (score,) = load_reward(f"{file}:{name}").scores(answers("x"))
    assert score.failure is not None and score.kind == "raised" and "\n" not in str(score.failure)
    assert f"raised {said}" in score.failure.what, score.failure
    place = f"({file}, line {line}, in "
    assert place in score.failure.what and (where in score.failure.what or sys.version_info >= (3, 12)), score.failure


SIZES = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([1e12, 1.01e12, 3e38, 1e300, 1e39, -1e300])


@settings(max_examples=150, derandomize=True, deadline=None)
@given(SIZES, st.dictionaries(st.sampled_from(["a", "b"]), SIZES, max_size=2), st.lists(SIZES, max_size=2))
def test_what_is_learned_from_is_finite_in_float32_and_so_are_its_squares(
    value: float, parts: dict[str, float], steps: list[float]
) -> None:
    given = {"score": value, **parts, "steps": [(1, reward) for reward in steps]}
    (score,) = RewardFunction(lambda response: given, "mine").scores(answers("x"))
    numbers = [value, *parts.values(), *steps, value + sum(steps)]
    assert (score.failure is None) == all(abs(n) <= LARGEST_REWARD for n in numbers)
    if score.failure is None:
        found_N = torch.tensor([total(score)], dtype=torch.float32).repeat(1024)
        assert bool(torch.isfinite(found_N.square().sum() * 1e10))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.tuples(SIZES, st.floats(-1e12, 1e12)), min_size=1, max_size=3))
def test_a_sum_of_parts_is_as_bounded(parts: list[tuple[float, float]]) -> None:
    scores = [[read_score("mine", value, answers("x"), 0)] for value, _ in parts]
    (score,) = combined([Part(str(i), None, weight=w) for i, (_, w) in enumerate(parts)], scores)  # type: ignore[arg-type]
    fits = all(abs(v) <= LARGEST_REWARD for v, _ in parts) and abs(sum(w * v for v, w in parts)) <= LARGEST_REWARD
    assert (score.failure is None) == fits and (score.kind == "nonsense") == (not fits)


def bonus(response: str, ground_truth: str = "", extra: float = 0.0) -> float:
    return float(response == ground_truth) + extra


class Scorer:
    def __call__(self, response: str) -> float:
        return float(response)

    async def later(self, response: str) -> float:
        return float(response)


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        (functools.partial(bonus, extra=2.0), "bonus", 3.0),
        (functools.partial(functools.partial(bonus, extra=2.0), ground_truth="other"), "bonus", 2.0),
        (Scorer(), "Scorer", 2.0),
        (functools.partial(Scorer()), "Scorer", 2.0),
        (Scorer().later, "later", 2.0),
        (functools.partial(Scorer().later), "later", 2.0),
        (lambda response: 7, "<lambda>", 7.0),
        (functools.partial(max, 1), "max", None),
    ],
)
def test_whatever_can_be_called_is_a_reward(function: Any, name: str, value: float | None) -> None:
    assert name_of(function) == name
    if value is None:
        assert "has no signature" in str(refused(function))
        return
    grader = InProcessGrader({name_of(function): function})
    try:
        grader.submit(0, answers("2"))
        assert grader.ready() == [(0, [Score(value)])]
    finally:
        grader.close()
