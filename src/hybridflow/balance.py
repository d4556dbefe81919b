"""Balanced work: which sequences a rank takes, and which of those go through the model together.

Every rank waits for the slowest one. Sequences are never cut, so they are dealt by what they cost. The result of every
function here depends on its arguments alone: all processes that call it with the same numbers get the same result.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOKEN_WEIGHT = 24_576  # of a model of hidden size 2,048, see `token_weight`
SLACK = 0.01  # how much more work than the others a rank may have


def token_weight(config: Mapping[str, Any]) -> int:
    """Returns how many pairs of tokens in attention cost as much as one token in all matrices of a model.

    With N weights that a token is multiplied by, a token costs 2 N operations; causal attention over n tokens costs
    2 L H D n^2 with L layers of H heads of size D. Counted in the latter, a sequence costs ``N / (L H D) n + n^2``.
    Layers of 12 d^2 weights with d = H D, and no output layer, make it 12 d. Sliding windows are not taken off, and
    weights that these keys of `config` do not tell (multi-head latent attention) are estimated.

    Args:
        config: the values of a model's ``config.json``; `TOKEN_WEIGHT` where it lacks sizes.
    """
    hidden, layers, heads = (config.get(k) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    if not (hidden and layers and heads):
        return TOKEN_WEIGHT
    head_size = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head_size * (heads + (config.get("num_key_value_heads") or heads))
    inner = config.get("intermediate_size") or 4 * hidden
    if config.get("moe_intermediate_size"):
        active = (config.get("num_experts_per_tok") or 1) + (config.get("n_shared_experts") or 0)
        inner = config["moe_intermediate_size"] * active
    weights = layers * (attention + 3 * hidden * inner) + hidden * (config.get("vocab_size") or 0)
    return int(weights // (layers * heads * head_size))


def sequence_costs(lengths: Sequence[int], weight: int = TOKEN_WEIGHT) -> list[int]:
    """Computes the cost of a forward pass of each sequence: ``weight * n + n^2``; see `token_weight`."""
    return [weight * n + n * n for n in lengths]


def beginning_costs(beginnings: Sequence[int], weight: int = TOKEN_WEIGHT) -> list[int]:
    """Computes the part of it that sequences that begin alike pay once: their beginning's tokens, not the attention to
    them.
    """
    return [weight * n for n in beginnings]


def balanced_ranks(
    costs: Sequence[int], ranks: int, groups: Sequence[int] | None = None, shared: Sequence[int] | None = None
) -> list[list[int]]:
    """Deals the sequences to ranks, so that the largest load is small.

    The most expensive are dealt first, each to the rank with the least work: without groups, the largest load is at
    most 4/3 - 1/(3 ranks) times what is possible (Graham, Bounds on Multiprocessing Timing Anomalies, 1969), and close
    to it where a rank gets several. Groups are dealt as a whole; then the busiest rank gives single sequences to the
    idlest one until it is within `SLACK` of what no cut can go below, or nothing helps any more. Where dealing all
    sequences one by one ends better than that by more than `SLACK`, groups are not kept.

    Args:
        costs: of each sequence alone.
        ranks: how many there are.
        groups: sequences with the same number begin alike.
        shared: the part of its cost that a sequence does not add to a rank that has another one of its group.

    Returns:
        For each rank its sequences, ascending; every sequence once. Empty lists where there are fewer than ranks.
    """
    work = _Work(costs, range(len(costs)) if groups is None else groups, [0] * len(costs) if shared is None else shared)
    members = _by_group(range(len(costs)), work.groups)
    least = max(-(-sum(map(work.load, members)) // ranks), max(costs, default=0))
    whole = [piece for group in members for piece in _pieces(group, work, least)]
    single = [[row] for row in range(len(costs))]
    best: list[list[int]] = []
    largest = 0
    for pieces in (whole, single) if groups is not None else (single,):
        dealt = _deal([work.load(piece) for piece in pieces], ranks)
        parts = [[row for p in part for row in pieces[p]] for part in dealt]
        load = work.even(parts, round(least * (1 + SLACK)))
        if not best or load * (1 + SLACK) < largest:
            best, largest = parts, load
        if largest <= least * (1 + SLACK):
            break
    return [sorted(part) for part in best]


def balanced_parts(
    sizes: Sequence[int], budget: int, *, costs: Sequence[int] | None = None, at_least: int = 0
) -> list[list[int]]:
    """Cuts sequences into the fewest parts of at most `budget` each that dealing the largest first finds.

    Args:
        sizes: of each sequence, its number of tokens for example.
        budget: the most that the sequences of one part may add up to.
        costs: the amounts that the parts are to share evenly; None: their sizes.
        at_least: the fewest parts to make, some of them empty where there are too few sequences: ranks that take
            turns at collectives need the same number of parts. With the largest number that any of them needs by
            itself, every one gets exactly that many.

    Returns:
        Index lists, ascending, that together hold every index once; none for no sequences.

    Raises:
        ValueError: one sequence alone is over the budget. Sequences are never cut.
    """
    if sizes and max(sizes) > budget:
        raise ValueError(f"a sequence of cost {max(sizes)} does not fit a budget of {budget}")
    count = max(at_least, -(-sum(sizes) // budget), 1 if sizes else 0)
    parts = _deal(sizes, count)
    while any(sum(sizes[i] for i in part) > budget for part in parts):
        count += 1  # more parts never make the largest of them larger, so this ends, and `at_least` is exact
        parts = _deal(sizes, count)
    if costs is not None:
        parts = _deal_within(costs, sizes, budget, count) or parts
    return [sorted(part) for part in parts]


def seqlen_metrics(lengths: Sequence[int], parts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Computes how many tokens the ranks have, under verl's names.

    ``min``, ``max`` and their difference are of the batch cut in its order into equally many sequences for each rank;
    ``balanced_min`` and ``balanced_max`` are of the parts that were made; ``mean`` is the same for both.

    Args:
        lengths: tokens of each sequence.
        parts: the sequences of each rank.
    """
    ranks = len(parts)
    bounds = [len(lengths) * r // ranks for r in range(ranks + 1)]
    plain = [sum(lengths[a:b]) for a, b in itertools.pairwise(bounds)]
    balanced = [sum(lengths[i] for i in part) for part in parts]
    found = {
        "min": min(plain),
        "max": max(plain),
        "minmax_diff": max(plain) - min(plain),
        "balanced_min": min(balanced),
        "balanced_max": max(balanced),
        "mean": sum(lengths) / ranks,
    }
    return {f"global_seqlen/{name}": float(value) for name, value in found.items()}


def _deal(costs: Sequence[int], count: int) -> list[list[int]]:
    """Deals by the longest-processing-time rule; ties go to the lower index."""
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, part) for part in range(count)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, part = loads[0]
        parts[part].append(i)
        heapq.heapreplace(loads, (load + costs[i], part))
    return parts


def _deal_within(costs: Sequence[int], sizes: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """Deals each to the part of least cost that has room for it; None if one finds no room."""
    parts: list[list[int]] = [[] for _ in range(count)]
    loads, filled = [0] * count, [0] * count
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        room = [part for part in range(count) if filled[part] + sizes[i] <= budget]
        if not room:
            return None
        part = min(room, key=lambda part: (loads[part], part))
        parts[part].append(i)
        loads[part] += costs[i]
        filled[part] += sizes[i]
    return parts


@dataclass(frozen=True, slots=True)
class _Work:
    """The costs of sequences on a rank, see `balanced_ranks`."""

    costs: Sequence[int]
    groups: Sequence[int]
    shared: Sequence[int]

    def load(self, rows: Sequence[int]) -> int:
        """Returns the cost of these sequences on one rank: the beginning of every group once."""
        beginnings: dict[int, int] = {}
        total = 0
        for row in rows:
            beginning = self.shared[row]
            total += self.costs[row] - beginning
            beginnings[self.groups[row]] = max(beginning, beginnings.get(self.groups[row], 0))
        return total + sum(beginnings.values())

    def even(self, parts: list[list[int]], limit: int) -> int:
        """Moves single sequences from the busiest rank to the idlest one while that helps; returns the largest load
        left.
        """
        loads = [self.load(part) for part in parts]
        while (largest := max(loads)) > limit:
            giver, taker = loads.index(largest), loads.index(min(loads))
            given = Counter(self.groups[row] for row in parts[giver])
            taken = {self.groups[row] for row in parts[taker]}
            after: list[tuple[int, int, int, int]] = []
            for place, row in enumerate(parts[giver]):
                less = self.costs[row] - (self.shared[row] if given[self.groups[row]] > 1 else 0)
                more = self.costs[row] - (self.shared[row] if self.groups[row] in taken else 0)
                after.append((max(largest - less, loads[taker] + more), place, less, more))
            worst, place, less, more = min(after)
            if worst >= largest:
                break
            parts[taker].append(parts[giver].pop(place))
            loads[giver] -= less
            loads[taker] += more
        return max(loads)


def _by_group(rows: Sequence[int], groups: Sequence[int]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for row in rows:
        found.setdefault(groups[row], []).append(row)
    return list(found.values())


def _pieces(rows: list[int], work: _Work, most: int) -> list[list[int]]:
    """Cuts a group that costs more than a rank is to have into halves, quarters and so on."""
    if len(rows) == 1 or work.load(rows) <= most:
        return [rows]
    middle = len(rows) // 2
    return _pieces(rows[:middle], work, most) + _pieces(rows[middle:], work, most)
