"""The reward of form: 1 if a response is made of the given tags, each once, in order, none of them empty.

``<think>...</think> <answer>...</answer>`` is DeepSeek-R1's form (arXiv 2501.12948). Outside the tags there may be
white space only, and no tag may be inside another. verl has this only as a part of single rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybridflow.rewards.verifiable.text import plain


def score(response: str, tags: Sequence[str] = ("think", "answer"), opened: str = "") -> float:
    """Returns 1.0 for the form, else 0.0.

    >>> score("<think>2 + 2</think>\\n<answer>4</answer>"), score("2 + 2</think><answer>4</answer>", opened="<think>")
    (1.0, 1.0)
    >>> score("<answer>4</answer>"), score("<think> </think><answer>4</answer>")
    (0.0, 0.0)
    >>> score("<think>a</think>so<answer>4</answer>"), score("<think>a</think><answer>4")
    (0.0, 0.0)
    >>> score("<think>a</think><answer>4</answer><answer>5</answer>"), score("<think><answer>4</answer></think>")
    (0.0, 0.0)

    Args:
        response: what the policy generated.
        tags: names of the tags, in order.
        opened: the beginning of the response that the prompt's template writes, such as ``<think>``.
    """
    rest = opened + response
    if any(rest.count(mark) != 1 for tag in tags for mark in (f"<{tag}>", f"</{tag}>")):
        return 0.0
    for tag in tags:
        outside, _, rest = rest.partition(f"<{tag}>")
        inside, closed, rest = rest.partition(f"</{tag}>")
        if outside.strip() or not closed or not plain(inside).strip() or any(f"<{other}>" in inside for other in tags):
            return 0.0
    return float(not rest.strip())
