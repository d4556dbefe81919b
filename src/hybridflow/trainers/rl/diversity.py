"""Measures how much a step's responses differ, how much they repeat themselves, and whether length alone earns reward.

Every step has these numbers; `tracking.reward_watch` compares all but the first with the reward. They read a bounded
part of long responses, so that they cost milliseconds.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

PAIRS = 2048  # pairs of neighbouring tokens that are compared: among more pairs fewer are distinct, in any text
TAIL = 256  # last characters of a response in which its final number is looked for
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
STRETCH = 32  # tokens within which a pair counts as repeated: in a long text common pairs recur anyway


def diversity(
    tokens: Sequence[Sequence[int]],
    texts: Sequence[str],
    prompts: Sequence[int],
    rewards: Sequence[float] = (),
    truths: Sequence[object] = (),
) -> dict[str, float]:
    """Measures a step's responses; a number that has no meaning for them is left out.

    ``rollout/distinct_2``: the share of distinct pairs among the pairs of neighbouring tokens of all responses
    (distinct-2 of Li et al., arXiv 1510.03055), of `PAIRS` pairs that are spread evenly over them. It falls when
    responses to one prompt agree, as right ones do.

    ``rollout/seq_rep_2``: the share of pairs that occurred earlier in the same response (seq-rep-2 of Welleck et al.,
    arXiv 1908.04319), within stretches of `STRETCH` tokens, so that longer responses of the same kind repeat no more.

    ``rollout/top_answer_share``: the share of responses to other prompts that give the most common final answer: 0
    where each prompt has its own, 1 where all prompts get the same. `final_answer` defines what is compared. Prompts
    whose ground truth it is are not counted: where A, B, C and D are right in turn, many prompts have the same letter.

    ``rollout/length_reward_corr``: the correlation of length and reward among the responses to a prompt, averaged over
    the prompts whose responses differ in both.

    Args:
        tokens: token ids of each response.
        texts: its text.
        prompts: the index of its prompt.
        rewards: its reward; without rewards there is no number for length and reward.
        truths: the ground truth of its prompt, if the data has one.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt].append(i)
    found: dict[str, float] = {}
    pairs = _some_pairs(tokens)
    if pairs:
        found["rollout/distinct_2"] = len(set(pairs)) / len(pairs)
    repeated = _repeated(tokens)
    if repeated is not None:
        found["rollout/seq_rep_2"] = repeated
    if len(groups) > 1:
        found["rollout/top_answer_share"] = _top_share(
            [Counter(final_answer(texts[i]) for i in members) for members in groups.values()],
            [str(truths[members[0]]) if truths else "" for members in groups.values()],
        )
    scored = groups.values() if rewards else ()
    pulls = [_correlation([len(tokens[i]) for i in m], [rewards[i] for i in m]) for m in scored]
    known = [pull for pull in pulls if pull is not None]
    if known:
        found["rollout/length_reward_corr"] = math.fsum(known) / len(known)
    return found


def final_answer(text: str) -> str:
    """Returns the final answer of a response: the last number near its end; where there is none, all of it.

    >>> final_answer("7 + 5 is 12. The answer is $1,012.00."), final_answer(" Yes. ")
    ('1012.00', 'Yes.')
    """
    numbers = NUMBER.findall(text[-TAIL:])
    return numbers[-1].replace(",", "") if numbers else text.strip()


def _top_share(answers: Sequence[Counter[str]], truths: Sequence[str]) -> float:
    """Computes the greatest share that one final answer has among the prompts for which it is wrong; one prompt is not
    counted.
    """
    share: Counter[str] = Counter()
    for counts in answers:
        for answer, count in counts.items():
            share[answer] += count / counts.total()  # type: ignore[assignment]
    top = 0.0
    for answer, whole in share.items():
        if (whole - 1) / (len(answers) - 1) > top:  # else it cannot be the greatest
            right = max(1, sum(_is(answer, truth) for truth in truths))
            top = max(top, (whole - right) / max(len(answers) - right, 1))
    return top


def _is(answer: str, truth: str) -> bool:
    """Returns whether a final answer states the ground truth: equals it, or has it as its last word ("The answer is
    (B).").
    """
    words = re.findall(r"\w+", answer)
    return bool(truth) and (answer == truth or final_answer(truth) == answer or words[-1:] == [truth])


def _repeated(tokens: Sequence[Sequence[int]]) -> float | None:
    """Computes the share of token pairs that occurred earlier in their stretch of a response, over about `PAIRS` pairs;
    None without pairs.
    """
    stretches = [answer[i : i + STRETCH] for answer in tokens for i in range(0, max(len(answer) - 1, 0), STRETCH - 1)]
    stretches = stretches[:: math.ceil(len(stretches) * (STRETCH - 1) / PAIRS) or 1]
    total = sum(len(stretch) - 1 for stretch in stretches)
    different = sum(len(set(itertools.pairwise(stretch))) for stretch in stretches)
    return 1 - different / total if total else None


def _some_pairs(tokens: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Returns `PAIRS` of all pairs, evenly spread; all, where there are fewer."""
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
    """Computes Pearson's correlation; None where either does not vary."""
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    dx, dy = [a - mean_x for a in x], [b - mean_y for b in y]
    size = math.sqrt(math.fsum(a * a for a in dx) * math.fsum(b * b for b in dy))
    return math.fsum(a * b for a, b in zip(dx, dy)) / size if size > 1e-12 else None
