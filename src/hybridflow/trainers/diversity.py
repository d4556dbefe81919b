"""How much a step's answers differ from each other, and whether their length alone earns reward.

Three numbers of every step, which `trainers.reward_watch` holds against the reward. They look at a bounded part of long
answers, so that they cost milliseconds.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

PAIRS = 2048  # of neighbouring tokens that are compared: with more of them fewer would be new, whatever they are
TAIL = 256  # last characters of an answer in which its final number is looked for
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def diversity(
    tokens: Sequence[Sequence[int]], texts: Sequence[str], prompts: Sequence[int], rewards: Sequence[float] = ()
) -> dict[str, float]:
    """What is said of a step's answers, by name; a number that has no meaning for them is left out.

    ``rollout/distinct_2``: the share of different ones among the pairs of neighbouring tokens of all answers
    (distinct-2 of Li et al., arXiv 1510.03055), of `PAIRS` pairs that are spread evenly over them.

    ``rollout/top_answer_share``: how much of the answers to other prompts the most common final answer is: 0 where each
    prompt has its own, 1 where all prompts are answered the same. `final_answer` says what is compared.

    ``rollout/length_reward_corr``: the correlation of length and reward among the answers to a prompt, averaged over
    the prompts whose answers differ in both.

    Args:
        tokens: token ids of each answer.
        texts: its text.
        prompts: which prompt it answers.
        rewards: what it is worth; without them nothing is said of length and reward.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt].append(i)
    found: dict[str, float] = {}
    pairs = _some_pairs(tokens)
    if pairs:
        found["rollout/distinct_2"] = len(set(pairs)) / len(pairs)
    if len(groups) > 1:
        share: Counter[str] = Counter()
        for members in groups.values():
            for answer, count in Counter(final_answer(texts[i]) for i in members).items():
                share[answer] += count / len(members)  # type: ignore[assignment]
        found["rollout/top_answer_share"] = max(0.0, (max(share.values()) - 1) / (len(groups) - 1))
    scored = groups.values() if rewards else ()
    pulls = [_correlation([len(tokens[i]) for i in m], [rewards[i] for i in m]) for m in scored]
    known = [pull for pull in pulls if pull is not None]
    if known:
        found["rollout/length_reward_corr"] = math.fsum(known) / len(known)
    return found


def final_answer(text: str) -> str:
    """What an answer comes to: the last number near its end; where there is none, all of it.

    >>> final_answer("7 + 5 is 12. The answer is $1,012.00."), final_answer(" Yes. ")
    ('1012.00', 'Yes.')
    """
    numbers = NUMBER.findall(text[-TAIL:])
    return numbers[-1].replace(",", "") if numbers else text.strip()


def _some_pairs(tokens: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """`PAIRS` of all pairs, evenly spread; all, where there are fewer."""
    total = sum(max(len(answer) - 1, 0) for answer in tokens)
    count = min(total, PAIRS)
    pairs: list[tuple[int, int]] = []
    seen = 0
    for answer in tokens:
        before, seen = seen, seen + max(len(answer) - 1, 0)
        while len(pairs) < count and (at := len(pairs) * total // count) < seen:
            pairs.append((answer[at - before], answer[at - before + 1]))
    return pairs


def _correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's; None where either does not vary."""
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    dx, dy = [a - mean_x for a in x], [b - mean_y for b in y]
    size = math.sqrt(math.fsum(a * a for a in dx) * math.fsum(b * b for b in dy))
    return math.fsum(a * b for a, b in zip(dx, dy)) / size if size > 1e-12 else None
