"""From logits to tokens: one pass for all rows of a batch, each with its own parameters.

In this order, vLLM's: logit bias, repetition penalty, temperature, min-p, top-k, top-p over what is then left, and the
argmax after stateless Gumbel noise. Among equally likely tokens at the edge of what is kept, lower ids come first.
What no row asks for is not computed.

Log-probabilities are of the distribution really sampled: after temperature, and renormalised over the tokens kept. A
greedy row takes the likeliest token, whatever its filters; its log-probabilities are at temperature 1.

Shapes: R rows, V vocabulary, P rows that keep a part of the vocabulary, S likeliest tokens of a row, sorted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridflow.errors import UserError
from hybridflow.noise import gumbel
from hybridflow.protocols.generation import Sampling
from hybridflow.rollout.job import Job

NEAR_TIE = 1e-4
FIRST_SORTED = 256  # most likely tokens that top-p looks at first; a sort of a whole vocabulary takes far longer


@dataclass(frozen=True, slots=True)
class BatchNeeds:
    """What some of a number of rows ask for; found once for as long as the batch stays as it is."""

    samplings: list[Sampling]
    bias: bool
    penalty: bool
    temperature: bool
    cut: list[int]  # rows that keep a part of the vocabulary
    noise: bool
    greedy: bool

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> BatchNeeds:
        """Returns what these rows need."""
        s = [job.request.sampling for job in jobs]
        temperatures = {x.temperature for x in s}
        return cls(
            s,
            bias=any(x.logit_bias for x in s),
            penalty=any(x.repetition_penalty != 1 for x in s),
            temperature=not temperatures <= {0, 1},
            cut=[row for row, job in enumerate(jobs) if job.cuts],
            noise=any(temperatures),
            greedy=0 in temperatures,
        )


class Rows:
    """What sampling needs of every running row, on the device.

    Args:
        device: where the model runs.
        count_near_ties: count in `near_ties` the tokens whose two best noisy scores are within 1e-4.
    """

    def __init__(self, device: torch.device, count_near_ties: bool = False) -> None:
        self.jobs: list[Job] = []
        self._needs: BatchNeeds | None = None  # of all rows
        self.count_near_ties, self.near_ties = count_near_ties, 0
        # newest token (not yet in the cache), tokens of the sequence with it, tokens sampled, bits of the noise
        self.numbers_4R = torch.zeros(4, 0, dtype=torch.int64, device=device)
        self.floats_2R = torch.zeros(2, 0, device=device)  # temperature (1 where greedy), whether noise is added

    @property
    def last_R(self) -> Tensor:
        """Newest token of each row."""
        return self.numbers_4R[0]

    @property
    def length_R(self) -> Tensor:
        """Tokens of each row's sequence."""
        return self.numbers_4R[1]

    def enter(self, jobs: Sequence[Job]) -> None:
        """Adds rows at the end."""
        self.jobs += jobs
        self._needs = None
        numbers = [(0, j.length(), j.place(), j.request.noise.bits()) for j in jobs]
        temperatures = [j.request.sampling.temperature for j in jobs]
        device = self.numbers_4R.device
        floats = [[t or 1.0 for t in temperatures], [float(t > 0) for t in temperatures]]
        self.numbers_4R = torch.cat([self.numbers_4R, torch.tensor(numbers, device=device).T], 1)
        self.floats_2R = torch.cat([self.floats_2R, torch.tensor(floats, device=device)], 1)
        for job in jobs:
            if job.cuts and job.supports is None:
                job.supports = []

    def keep(self, order: list[int]) -> None:
        """Keeps only these rows, in this order."""
        self.jobs = [self.jobs[r] for r in order]
        self._needs = None
        index = torch.tensor(order, dtype=torch.int64, device=self.numbers_4R.device)
        self.numbers_4R, self.floats_2R = self.numbers_4R[:, index], self.floats_2R[:, index]

    def draw(self, logits_RV: Tensor, first: int) -> list[tuple[int, str]]:
        """Draws the next token of the rows from `first` on, and adds it to their jobs.

        Returns:
            The rows that have ended with it, ascending, and why.
        """
        jobs = self.jobs[first:]
        needs = BatchNeeds.of(jobs) if first or self._needs is None else self._needs
        self._needs = None if first else needs
        _, _, position_R, bits_R = self.numbers_4R[:, first:]
        temperature_R, noisy_R = self.floats_2R[:, first:]
        score_RV = logits_RV.float()
        if needs.bias:
            score_RV = biased(score_RV, [s.logit_bias for s in needs.samplings])
        if needs.penalty:
            penalties = [s.repetition_penalty for s in needs.samplings]
            score_RV = penalised(score_RV, penalties, [job.context() for job in jobs])
        if needs.temperature:
            score_RV = score_RV / temperature_R[:, None]
        if needs.cut:
            score_RV = self._cut(score_RV, needs.cut, jobs)
        best_RV = score_RV
        if needs.noise:
            best_RV = gumbel(bits_R, position_R, score_RV.shape[1])
            if needs.greedy:
                best_RV *= noisy_R[:, None]
            best_RV += score_RV
        token_R = best_RV.max(-1).indices
        if self.count_near_ties:
            best_R2 = best_RV.topk(2).values
            self.near_ties += int((best_R2[:, 0] - best_R2[:, 1] <= NEAR_TIE).sum())
        logp_R = score_RV.gather(-1, token_R[:, None])[:, 0] - score_RV.logsumexp(-1)
        self.numbers_4R[0, first:] = token_R
        self.numbers_4R[1:3, first:] += 1
        reasons = [job.take(token, logp) for job, token, logp in zip(jobs, token_R.tolist(), logp_R.tolist())]
        return [(first + row, reason) for row, reason in enumerate(reasons) if reason is not None]

    def _cut(self, score_RV: Tensor, rows: list[int], jobs: list[Job]) -> Tensor:
        """Returns scores with -inf for what filters leave out; records in the jobs what is kept."""
        everyone = len(rows) == len(jobs)
        part_PV = score_RV if everyone else score_RV[rows]
        kept_PV = kept(part_PV, [jobs[r].request.sampling for r in rows])
        part_PV = part_PV.masked_fill(~kept_PV, -torch.inf)
        sizes = kept_PV.sum(-1).tolist()
        supports = kept_PV.nonzero()[:, 1].to("cpu", torch.int32).split(sizes)
        for r, ids in zip(rows, supports):
            supported = jobs[r].supports
            assert supported is not None
            supported.append(ids if len(ids) < score_RV.shape[1] else ids[:0])
        return part_PV if everyone else score_RV.index_copy(0, torch.tensor(rows, device=score_RV.device), part_PV)


def biased(score_RV: Tensor, bias: Sequence[Sequence[tuple[int, float]]]) -> Tensor:
    """Returns scores with each row's (token id, value) pairs added."""
    entries = [(row, token, value) for row, pairs in enumerate(bias) for token, value in pairs]
    rows, tokens, values = (torch.tensor(x, device=score_RV.device) for x in zip(*entries))
    return score_RV.index_put((rows, tokens), values.float(), accumulate=True)


def penalised(score_RV: Tensor, penalty: Sequence[float], context: Sequence[Sequence[int]]) -> Tensor:
    """Returns scores in which those of tokens in a row's context are divided by its penalty where positive, else
    multiplied (arXiv 1909.05858).
    """
    entries = [(row, token) for row, tokens in enumerate(context) if penalty[row] != 1 for token in set(tokens)]
    rows, tokens = (torch.tensor(x, device=score_RV.device) for x in zip(*entries))
    found, by = score_RV[rows, tokens], torch.tensor(penalty, device=score_RV.device)[rows]
    return score_RV.index_put((rows, tokens), torch.where(found > 0, found / by, found * by))


def kept(score_PV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Returns the tokens that min-p, then top-k, then top-p keep of each row (bool ``[P, V]``); at least the likeliest
    one.
    """
    vocab, device = score_PV.shape[1], score_PV.device
    kept_PV = torch.ones_like(score_PV, dtype=torch.bool)
    if any(s.min_p > 0 for s in samplings):
        min_p_P = torch.tensor([s.min_p for s in samplings], device=device)
        kept_PV = score_PV >= score_PV.amax(-1, keepdim=True) + min_p_P.log()[:, None]
    top_k_P = torch.tensor([s.top_k or vocab for s in samplings], device=device).clamp_(max=vocab)
    # Sums of probabilities may round to 1 too early: 2 is never reached.
    top_p_P = torch.tensor([s.top_p if s.top_p < 1 else 2.0 for s in samplings], device=device, dtype=torch.float64)
    limited = [0 < s.top_k < vocab or s.top_p < 1 for s in samplings]
    if not any(limited):
        return kept_PV
    rows = torch.tensor(limited, device=device).nonzero()[:, 0]
    left_PV = score_PV[rows].masked_fill_(~kept_PV[rows], -torch.inf)
    kept_PV[rows] = _likeliest(left_PV, top_k_P[rows], top_p_P[rows])
    return kept_PV


def _likeliest(score_PV: Tensor, top_k_P: Tensor, top_p_P: Tensor) -> Tensor:
    """Returns the top_k likeliest tokens, and of these the fewest that make up top_p of their probability."""
    vocab = score_PV.shape[1]
    count_P = torch.minimum(top_k_P, (score_PV > -torch.inf).sum(-1))
    all_P = score_PV.double().logsumexp(-1)
    sorted_count = min(vocab, max(FIRST_SORTED, int(torch.where(top_k_P < vocab, top_k_P, 0).max())))
    while True:
        best_PS = score_PV.topk(sorted_count).values.double()
        step_S = torch.arange(sorted_count, device=score_PV.device)
        best_PS = best_PS.masked_fill(step_S >= count_P[:, None], -torch.inf)
        whole_P = torch.where(top_k_P < vocab, best_PS.logsumexp(-1), all_P)
        share_PS = (best_PS - whole_P[:, None]).exp()
        before_PS = share_PS.cumsum(-1) - share_PS
        number_P = torch.minimum((before_PS < top_p_P[:, None]).sum(-1), count_P)
        if sorted_count == vocab or bool(((number_P < sorted_count) | (number_P == count_P)).all()):
            break
        sorted_count = vocab
    edge_P1 = best_PS.gather(-1, number_P[:, None].clamp_(min=1) - 1).to(score_PV.dtype)
    above_PV, edge_PV = score_PV > edge_P1, score_PV == edge_P1
    room_P1 = number_P[:, None] - above_PV.sum(-1, keepdim=True)
    if bool((edge_PV.sum(-1, keepdim=True) > room_P1).any()):  # ties at the edge: lower ids first
        edge_PV &= edge_PV.cumsum(-1) <= room_P1
    return above_PV | edge_PV


def check_sampling(sampling: Sampling, vocab: int) -> None:
    """Raises a UserError for parameters that mean nothing."""
    for name, value, good, allowed in [
        ("temperature", sampling.temperature, sampling.temperature >= 0, "0 (greedy) or more"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top_k", sampling.top_k, sampling.top_k >= 0, "0 (all tokens) or more"),
        ("min_p", sampling.min_p, 0 <= sampling.min_p <= 1, "0 to 1"),
        ("repetition_penalty", sampling.repetition_penalty, sampling.repetition_penalty > 0, "above 0"),
    ]:
        if not good:
            raise UserError(f"{name} is {value}, it must be {allowed}")
    for token, _ in sampling.logit_bias:
        if not 0 <= token < vocab:
            raise UserError(f"logit_bias names token {token}, the model's tokens are 0 to {vocab - 1}")
    if "" in sampling.stop:
        raise UserError("a stop string is empty", why="it would end every response at its first token")
    if sampling.stop_regex is not None:
        try:
            re.compile(sampling.stop_regex)
        except re.error as error:
            raise UserError(f"stop_regex {sampling.stop_regex!r} is not a regular expression: {error}") from error
