"""A test that breaks the processes that tests share fails alone: the next test has new ones."""

from __future__ import annotations

import time

import pytest

import ranks
from children import left_of
from on_ranks import breaking
from ranks import shared_ranks


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes of a group of two that no other test shares."""
    monkeypatch.setattr(ranks, "GRACE", 0.3)
    return shared_ranks(2, "broken").run(breaking.process_id)


def works(pids: list[int]) -> None:
    """There is a whole group again, and nothing is left of the one before."""
    assert shared_ranks(2, "broken").run(breaking.sum_of_ranks) == [1.0, 1.0]
    assert not set(shared_ranks(2, "broken").run(breaking.process_id)) & set(pids)
    assert left_of(pids) == set()


def test_a_group_that_nobody_breaks_is_the_same_for_all(group: list[int]) -> None:
    assert shared_ranks(2, "broken").run(breaking.process_id) == group


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "rank 1:\nTraceback[\\s\\S]*ValueError: rank 1 has had enough"),
        ("ends", "rank 1:\nits process ended, exit status 3"),
        ("crashes", "exit status -11\\nFatal Python error: Segmentation fault[\\s\\S]*in break_on_rank_1"),
        ("answers with what cannot travel", "rank 1:\nTraceback[\\s\\S]*lambda"),
    ],
    ids=["raises", "ends", "crashes", "does not travel"],
)
def test_a_test_that_breaks_a_group_fails_alone(how: str, said: str, group: list[int]) -> None:
    begun = time.monotonic()
    with pytest.raises(AssertionError, match=said):
        shared_ranks(2, "broken").run(breaking.break_on_rank_1, how)
    assert time.monotonic() - begun < 30  # rank 0 waits for rank 1 in a collective, which gives up after 60
    works(group)


def test_a_test_that_runs_out_of_time_takes_its_group_with_it(
    group: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the limit on a test's seconds does, an exception comes between a question and its answer."""

    class Late(BaseException):
        pass

    def late(*_: object) -> None:
        raise Late

    monkeypatch.setattr(ranks, "wait", late)
    with pytest.raises(Late):
        shared_ranks(2, "broken").run(breaking.break_on_rank_1, "hangs")
    monkeypatch.undo()
    works(group)
