"""Rewards put together: sums of parts, rows of several sources, in whatever order the parts come back."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridflow.protocols.rewards import Answers, Failure, Score
from hybridflow.protocols.waiting import never
from hybridflow.rewards.graders.composed import ComposedGrader, Part, combined


class Slow:
    """A backend whose answers come back when they are let go, in any order."""

    def __init__(self, seed: int) -> None:
        self.random, self.asked, self.should_return = random.Random(seed), [], never

    def submit(self, key: int, answers: Answers, function: str | None = None) -> None:
        factor = {None: 1.0, "double": 2.0}[function]
        self.asked.append((key, [Score(factor * float(text)) for text in answers.responses]))

    def ready(self) -> list[tuple[int, list[Score]]]:
        self.random.shuffle(self.asked)
        count = self.random.randint(0, len(self.asked))
        done, self.asked = self.asked[:count], self.asked[count:]
        return done

    def wait(self) -> list[tuple[int, list[Score]]]:
        return [self.asked.pop(self.random.randrange(len(self.asked)))] if self.asked else []

    def cancel(self) -> None:
        self.asked.clear()

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


def answers(*texts: str, source: str = "plain") -> Answers:
    return Answers(list(texts), None, [], {"data_source": source})


def test_a_reward_that_does_not_judge_a_response_is_left_out_of_its_sum() -> None:
    parts = [Part("a", Slow(0), None, 2.0, True), Part("b", Slow(0))]
    none, ones = Score(0.0, applies=False), [Score(1.0), Score(3.0), Score(5.0)]
    first, second, third = combined(parts, [[none, Score(1.0), Score(3.0)], ones])
    assert (first.value, first.components) == (1.0, {"b": 1.0})
    # Held against the two responses that it judges: mean 2, deviation 1.
    assert (second.value, third.value) == (pytest.approx(1.0, abs=1e-5), pytest.approx(7.0, abs=1e-5))
    assert second.components == {"a": 1.0, "b": 3.0}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_every_submission_comes_back_once_with_its_own_scores(seed: int) -> None:
    one, two = Slow(seed), Slow(seed + 1)

    def route(asked: Answers) -> list[Part]:
        if asked.row["data_source"] == "plain":
            return [Part(None, one)]
        return [Part("a", one, "double", 0.5), Part("b", two, None, -1.0), Part("c", one, None, 10.0)]

    grader = ComposedGrader(route, [one, two])
    expected, found = {}, {}
    for key in range(20):
        source = "plain" if key % 3 else "sum"
        texts = [str(key), str(key + 0.5)]
        expected[key] = [float(t) if source == "plain" else 10 * float(t) for t in texts]
        grader.submit(key, answers(*texts, source=source))
        for k, scores in grader.ready():
            assert k not in found
            found[k] = scores
    while len(found) < 20:
        got = grader.wait()
        assert got
        for k, scores in got:
            assert k not in found
            found[k] = scores
    assert {k: [s.value for s in scores] for k, scores in found.items()} == expected
    assert grader.wait() == [] and grader.ready() == []
    assert found[0][0].components == {"a": 0.0, "b": 0.0, "c": 0.0}


def test_what_was_cancelled_never_comes_back() -> None:
    backend = Slow(0)
    grader = ComposedGrader(lambda asked: [Part(None, backend)], [backend])
    grader.submit(1, answers("1"))
    grader.cancel()
    grader.submit(1, answers("2"))
    assert [(k, [s.value for s in scores]) for k, scores in grader.wait()] == [(1, [2.0])]


def parts(*given: dict[str, Any]) -> list[Part]:
    return [Part(name, Slow(0), **{"weight": 1.0} | how) for name, how in zip("abc", given)]


def test_parts_are_normalised_then_cut_then_weighted() -> None:
    scores = [[Score(0.0), Score(4.0), Score(8.0)], [Score(1.0, {"why": 7.0}), Score(5.0), Score(-9.0)]]
    found = combined(parts({"weight": 2.0, "normalize": True, "clip": (-1.0, 9.0)}, {"clip": (-2.0, 2.0)}), scores)
    deviation = (32 / 3) ** 0.5
    assert [s.value for s in found] == pytest.approx([2 * -1.0 + 1.0, 0.0 + 2.0, 2 * 4 / deviation - 2.0], abs=1e-5)
    assert found[0].components == {"a": 0.0, "b": 1.0, "b/why": 7.0}, "raw values, as they were given"


def test_a_part_that_failed_fails_the_answer_and_counts_in_no_mean() -> None:
    failed = Score(0.0, failure=Failure("raised", "the reward a raised"))
    found = combined(parts({"normalize": True}, {}), [[failed, Score(1.0), Score(3.0)], [Score(1.0)] * 3])
    assert found[0] is failed
    assert [s.value for s in found[1:]] == pytest.approx([0.0, 2.0], abs=1e-5)


def test_rewards_of_steps_are_weighted_and_put_in_order() -> None:
    found = combined(
        parts({"weight": 0.5}, {"weight": 2.0}), [[Score(1.0, steps=((9, 1.0),))], [Score(0.0, steps=((4, 1.0),))]]
    )
    assert found == [Score(0.5, {"a": 1.0, "b": 0.0}, ((4, 2.0), (9, 0.5)))]
