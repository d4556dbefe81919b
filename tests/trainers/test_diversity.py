"""What is measured of a step's answers: worked by hand, and against a plain count."""

from __future__ import annotations

import random
import statistics
import time

import pytest

from hybridflow.trainers.rl.diversity import PAIRS, STRETCH, diversity, final_answer


def measured(
    texts: list[str],
    prompts: list[int],
    rewards: list[float] | None = None,
    tokens: list[list[int]] | None = None,
    truths: list[str] | None = None,
) -> dict[str, float]:
    found = diversity(tokens or [list(map(ord, text)) for text in texts], texts, prompts, rewards or [], truths or [])
    return {name.removeprefix("rollout/"): value for name, value in found.items()}


def test_distinct_pairs_are_counted_over_all_answers() -> None:
    assert measured(["abab", "ab", "x", ""], [0, 1, 2, 3])["distinct_2"] == 2 / 4  # ab ba ab, ab
    assert measured(["abcd", "efgh"], [0, 1])["distinct_2"] == 1.0
    assert "distinct_2" not in measured(["a", ""], [0, 1])


def test_longer_answers_of_the_same_kind_are_as_distinct() -> None:
    rng = random.Random(0)

    def share(length: int, alphabet: int = 60) -> float:
        tokens = [[rng.randrange(alphabet) for _ in range(length)] for _ in range(64)]
        return measured([""] * 64, [*range(64)], tokens=tokens)["distinct_2"]

    assert PAIRS / 64 < 40
    assert share(400) == pytest.approx(share(40), rel=0.05)  # all pairs together would be ten times as many
    assert share(400, alphabet=6) < 0.1 * share(400)


def test_repetition_is_counted_within_an_answer() -> None:
    def repeated(*texts: str) -> float:
        return measured(list(texts), [*range(len(texts))])["seq_rep_2"]

    assert repeated("abab", "ab", "x", "") == 1 - 3 / 4  # ab ba ab | ab
    assert repeated("47.", "47.", "47.", "47.") == 0.0  # right answers to one prompt agree
    assert repeated("9" * 32) == 1 - 1 / 31
    assert "seq_rep_2" not in measured(["a", ""], [0, 1])
    rng = random.Random(0)

    def at(length: int, count: int) -> float:
        return repeated(*("".join(rng.choices("0123456789", k=length)) for _ in range(count)))

    assert at(4000, 4) == pytest.approx(at(STRETCH, 500), abs=0.03)  # about 63 stretches; as a whole nearly 1
    assert at(4000, 4) < 0.25


def test_an_answer_that_is_right_for_many_prompts_is_not_held_against_it() -> None:
    def share(texts: list[str], truths: list[str]) -> float:
        return measured(texts, [*range(len(texts))], truths=truths)["top_answer_share"]

    letters = ["A", "B", "A", "B", "A", "B"]
    assert share(letters, letters) == 0.0
    assert share([f"The answer is ({x})." for x in letters], letters) == 0.0
    assert share(["yes"] * 6, ["yes", "no"] * 3) == 1.0  # it says the same where that is wrong
    assert share(["7"] * 6, ["7", "7", "1", "2", "3", "4"]) == 1.0
    assert share(["7", "7", "7", "2", "3", "4"], ["7", "7", "1", "2", "3", "4"]) == pytest.approx(1 / 4)
    assert share(["99999"] * 3, ["1", "2", "3"]) == share(["99999"] * 3, []) == 1.0


def test_the_share_of_one_answer_counts_other_prompts_only() -> None:
    def share(*answers: list[str]) -> float:
        texts = [text for group in answers for text in group]
        return measured(texts, [i for i, group in enumerate(answers) for _ in group])["top_answer_share"]

    assert share(["so 1", "so 1"], ["so 2", "so 2"], ["so 3", "so 3"]) == 0.0
    assert share(["so 7", "7!"], ["it is 7", "7"], ["7", "7"]) == 1.0
    assert share(["7", "7"], ["7", "2"], ["3", "4"]) == pytest.approx((1 + 0.5 - 1) / 2)
    assert share(["7", "1"], ["2", "3"], ["4", "5"]) == 0.0
    assert "top_answer_share" not in measured(["7", "7"], [0, 0])


def test_what_an_answer_comes_to() -> None:
    assert final_answer("7+6=13,4+8+1=13,3+5+1=9#933") == "933"
    assert final_answer("Step 1. x = 3\nThe answer is \\boxed{1,234.50}.") == "1234.50"
    assert final_answer(" I cannot say. ") == "I cannot say."
    assert final_answer("12 " + "word " * 200) == ("12 " + "word " * 200).strip()  # a number at the beginning is not it


def test_whether_length_is_paid_is_a_matter_between_answers_to_one_prompt() -> None:
    def pull(texts: list[str], rewards: list[float], prompts: list[int]) -> float | None:
        return measured(texts, prompts, rewards).get("length_reward_corr")

    assert pull(["a", "aa", "aaa"], [1, 2, 3], [0, 0, 0]) == pytest.approx(1.0)
    assert pull(["a", "aa", "aaa"], [3, 2, 1], [0, 0, 0]) == pytest.approx(-1.0)
    # Between the prompts longer answers earn more, to each of them less.
    assert pull(["a", "aa", "a" * 50, "a" * 51], [0.1, 0.0, 1.0, 0.9], [0, 0, 1, 1]) == pytest.approx(-1.0)
    assert pull(["a", "aa", "a" * 9, "a" * 9], [1, 0, 1, 0], [0, 0, 1, 1]) == pytest.approx(-1.0)  # one of them tells
    assert pull(["a", "aa"], [1, 1], [0, 0]) is None
    x, y = [3.0, 1.0, 4.0, 1.0, 5.0], [2.0, 7.0, 1.0, 8.0, 2.0]
    assert pull(["a" * int(n) for n in x], y, [0] * 5) == pytest.approx(statistics.correlation(x, y))


def test_it_costs_milliseconds() -> None:
    rng = random.Random(0)
    tokens = [[rng.randrange(1000) for _ in range(64)] for _ in range(512)]
    texts = [" ".join(map(str, ids)) for ids in tokens]
    prompts, rewards = [i // 8 for i in range(512)], [rng.random() for _ in range(512)]
    seconds = []
    for _ in range(5):
        began = time.process_time()
        diversity(tokens, texts, prompts, rewards, texts)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.01
