"""The statistics of evaluations: pass@k, maj@k, confidence intervals, and paired tests, as pure functions.

A prompt has n responses, of which c succeed. An interval is over prompts: prompts are the sample from a population, and
responses to one prompt are not independent. All randomness is a function of a `NoiseKey`. Shapes: P prompts, R
resamples.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import product

import torch
from torch import Tensor

from hybridflow.noise import NoiseKey

CONFIDENCE_Z = 1.959963984540054  # the normal quantile of 97.5 %
RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 2_000_000  # bounds the memory of a bootstrap, in indices
EXACT_FLIPS = 14  # up to this many differences, all 2^14 signs are tried

Interval = tuple[float, float]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Computes the chance that k responses drawn without replacement hold a success: 1 - C(n - c, k) / C(n, k).

    It is the unbiased estimate of pass@k (Chen et al., arXiv 2107.03374, equation 1), computed on exact integers.

    >>> pass_at_k(4, 1, 2)
    0.5

    Raises:
        ValueError: k is not within 1..n, or c not within 0..n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@{k} of {n} responses with {c} successes")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(votes: Sequence[Hashable], rewards: Sequence[float], k: int) -> float:
    """Computes the expected reward of the most frequent answer among k drawn without replacement; ties are drawn by
    lot.

    Self-consistency (Wang et al., arXiv 2203.11171), exact over all C(n, k) subsets. Only the counts of the others
    matter for whether an answer with j votes wins, so subsets are counted, not listed: each other answer with m votes
    gives j' < j of them in C(m, j') ways, or ties in C(m, j) ways.

    Args:
        votes: the answer that each response gives, n of them.
        rewards: the reward of each response, n of them; equal answers may have different rewards.
        k: size of the subsets.

    >>> maj_at_k(["7", "7", "8"], [1.0, 1.0, 0.0], 3)
    1.0
    >>> maj_at_k(["7", "8"], [1.0, 0.0], 2)
    0.5

    Raises:
        ValueError: k is not within 1..n.
    """
    if not 1 <= k <= len(votes):
        raise ValueError(f"maj@{k} of {len(votes)} responses")
    worth: dict[Hashable, list[float]] = defaultdict(list)
    for vote, reward in zip(votes, rewards, strict=True):
        worth[vote].append(reward)
    sizes = Counter(len(found) for found in worth.values())
    wins = {m: sum(_wins(m, j, k, sizes) for j in range(1, min(m, k) + 1)) for m in sizes}
    total = math.comb(len(votes), k)
    return math.fsum(wins[len(found)] / total * (math.fsum(found) / len(found)) for found in worth.values())


def _wins(m: int, j: int, k: int, sizes: Counter[int]) -> float:
    """Counts the subsets of size k in which an answer with m responses has j of them and wins, each by its share of
    ties.

    Args:
        m: responses that give the answer.
        j: how many of them are in the subset.
        k: size of the subset.
        sizes: how many answers have how many responses, this one included.
    """
    ways = {(k - j, 0): 1}  # (places left in the subset, answers tied with this one): ways so far
    for size, answers in sizes.items():
        for _ in range(answers - (size == m)):
            grown: dict[tuple[int, int], int] = defaultdict(int)
            for (left, tied), count in ways.items():
                for taken in range(min(size, j, left) + 1):
                    grown[left - taken, tied + (taken == j)] += count * math.comb(size, taken)
            ways = grown
    return math.comb(m, j) * math.fsum(count / (tied + 1) for (left, tied), count in ways.items() if left == 0)


def mean_interval(values: Sequence[float], key: NoiseKey) -> tuple[Interval, str]:
    """Computes a 95 % confidence interval of the mean over prompts, and names its method.

    "wilson" where every value is 0 or 1 (E. B. Wilson, JASA 22, 1927; it keeps its coverage with few prompts and at
    shares near 0 and 1: Brown, Cai and DasGupta, Statistical Science 16, 2001). Otherwise "bootstrap": percentiles of
    the means of 10,000 resamples of the prompts (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).

    Args:
        values: one per prompt.
        key: of the resamples' noise.
    """
    if all(value in (0, 1) for value in values):
        return wilson(sum(values), len(values)), "wilson"
    return bootstrap(values, key), "bootstrap"


def wilson(successes: float, count: int) -> Interval:
    """Computes Wilson's 95 % interval of a share: all p with ``|successes/count - p| <= z sqrt(p (1 - p) / count)``."""
    p, z = successes / count, CONFIDENCE_Z
    center = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, center - half) if successes else 0.0, min(1.0, center + half) if successes < count else 1.0


def bootstrap(values: Sequence[float], key: NoiseKey) -> Interval:
    """Computes the 2.5th and 97.5th percentile of the means of `RESAMPLES` resamples with replacement."""
    value_P = torch.tensor(values, dtype=torch.float64)
    rng = _generator(key)
    means_R: list[Tensor] = []
    done, most = 0, max(1, RESAMPLES_AT_ONCE // len(values))
    while done < RESAMPLES:
        rows = min(most, RESAMPLES - done)
        means_R.append(value_P[torch.randint(len(values), (rows, len(values)), generator=rng)].mean(1))
        done += rows
    low, high = torch.quantile(torch.cat(means_R), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def sign_test(first: int, second: int) -> float:
    """Computes the two-sided exact p-value of McNemar's test: prompts on which only the first, and only the second
    succeeds.

    Were both equally good, either would be a fair coin's work (binomial; Q. McNemar, Psychometrika 12, 1947).

    >>> sign_test(0, 5)
    0.0625
    """
    n, low = first + second, min(first, second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(low + 1)) / 2**n)


def permutation_test(differences: Sequence[float], key: NoiseKey) -> tuple[float, str]:
    """Computes the two-sided p-value of a mean difference under flips of the signs, and names its method.

    "exact" tries all signs where at most 14 differences are not zero (R. A. Fisher, The Design of Experiments, 1935).
    Otherwise "sampled" draws 10,000 of them and counts the one observed, so that p is never 0 (Phipson and Smyth,
    Statistical Applications in Genetics and Molecular Biology 9, 2010).

    Args:
        differences: one per prompt.
        key: of the flips' noise.
    """
    kept = [d for d in differences if d != 0]
    # Sums that are equal but for rounding count as equal.
    observed = abs(math.fsum(kept)) * (1 - 1e-12)
    if len(kept) <= EXACT_FLIPS:
        sums = [math.fsum(s * d for s, d in zip(signs, kept)) for signs in product((1, -1), repeat=len(kept))]
        return sum(abs(s) >= observed for s in sums) / len(sums), "exact"
    difference_P = torch.tensor(kept, dtype=torch.float64)
    rng = _generator(key)
    extreme, done, most = 0, 0, max(1, RESAMPLES_AT_ONCE // len(kept))
    while done < RESAMPLES:
        rows = min(most, RESAMPLES - done)
        sign_RP = torch.randint(2, (rows, len(kept)), generator=rng).double() * 2 - 1
        extreme += int(((sign_RP @ difference_P).abs() >= observed).sum())
        done += rows
    return (extreme + 1) / (RESAMPLES + 1), "sampled"


def _generator(key: NoiseKey) -> torch.Generator:
    """Returns a generator of its own, begun from the key: no other draws change it, nor does it change theirs."""
    return torch.Generator().manual_seed(key.bits())
