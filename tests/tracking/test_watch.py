"""The advice on a growing gap: said once for every time that it grows, and it names the part that did."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hybridflow.tracking.mismatch_watch import MismatchWatch


def said(kl: Sequence[float], watch: MismatchWatch | None = None, part: str = "numerics") -> dict[int, str]:
    """What is said after which step, where this part makes up the divergence."""
    watch = watch or MismatchWatch(corrected=False)
    found = {}
    for step, value in enumerate(kl):
        metrics = {"rollout_corr/k3_kl": value, "mismatch/abs_logp_diff/p99": 0.0, "mismatch/k3/support": 0.0}
        metrics |= {"mismatch/k3/numerics": 0.0, "mismatch/k3/staleness": 0.0, f"mismatch/k3/{part}": value}
        text = watch.observe(metrics)
        if text is not None:
            found[step] = text
    return found


LOW, HIGH = 1e-3, 0.01


def test_it_is_said_once_when_it_stays_high_and_again_when_it_comes_back() -> None:
    assert list(said([LOW] * 8 + [HIGH] * 20)) == [10]
    assert list(said([LOW] * 8 + [HIGH] * 5 + [LOW] * 5 + [HIGH] * 5)) == [10, 20]
    between = 0.6 * 4 * LOW  # not low enough to count as gone
    assert list(said([LOW] * 8 + [HIGH] * 5 + [between] * 5 + [HIGH] * 5)) == [10]


@pytest.mark.parametrize(
    "kl",
    [
        [LOW] * 30,
        [HIGH] * 30,  # high from the beginning: it did not grow
        [1e-9] * 10 + [9e-4] * 10,  # a million times as much, and still nothing
        [LOW] * 8 + [HIGH, HIGH, LOW] * 6,  # it does not stay
        [LOW] * 3,
    ],
)
def test_nothing_is_said_where_nothing_is_wrong(kl: list[float]) -> None:
    assert not said(kl)


def test_the_part_that_grew_is_named_with_what_to_change() -> None:
    numerics, staleness = (said([LOW] * 8 + [HIGH] * 3, part=part)[10] for part in ("numerics", "staleness"))
    assert "rollout_corr/k3_kl stays above 0.01 (it was 0.001 in the first 5 steps)" in numerics
    assert "What grew is numerics" in numerics and "rollout.dtype=float32" in numerics
    assert "What grew is staleness" in staleness and "publish weights more often" in staleness
    assert all("algorithm.correction.preset=decoupled_token_is" in text for text in (numerics, staleness))
    corrected = said([LOW] * 8 + [HIGH] * 3, MismatchWatch(corrected=True))[10]
    assert "correction" not in corrected
    watch = MismatchWatch(corrected=False)
    texts = [watch.observe({"mismatch/k3/support": value}) for value in [0.05] * 5 + [0.5] * 3]
    assert texts[:-1] == [None] * 7 and "What grew is the sampling support" in str(texts[-1])
    watch = MismatchWatch(corrected=False)
    texts = [watch.observe({"mismatch/abs_logp_diff/p99": value}) for value in [0.02] * 5 + [0.3] * 3]
    assert texts[:-1] == [None] * 7 and "mismatch/abs_logp_diff/p99 stays above 0.3" in str(texts[-1])


def test_a_run_that_goes_on_knows_what_it_knew() -> None:
    kl = [LOW] * 8 + [HIGH] * 10
    for cut in range(1, len(kl)):
        watch = MismatchWatch(corrected=False)
        before = said(kl[:cut], watch)
        again = MismatchWatch(corrected=False)
        said(kl[:cut], again)  # shown the records, which say nothing anew
        assert [*before, *(cut + step for step in said(kl[cut:], again))] == [10]
