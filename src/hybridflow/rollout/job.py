"""A request on its way through an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridflow.errors import UserError
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Result, Span, Support
from hybridflow.rollout.stopping import StopText

Decode = Callable[[list[int]], str]


@dataclass(slots=True)
class Job:
    """What a request has generated so far, and which weights each part came from.

    Args:
        handle: what `submit` returned.
        request: the request.
        versions: (weight version, index of the first token sampled under it), in order.
        tokens: generated tokens.
        logps: their log-probabilities.
        supports: for each token the ids it was drawn from, empty where that was the whole vocabulary; None where the
            request cuts nothing.
        stop_text: looks for texts that end the request; None where it has none.
    """

    handle: int
    request: Request
    versions: list[tuple[int, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    supports: list[Tensor] | None = None
    stop_text: StopText | None = None
    room: int = field(init=False)  # most tokens that it can generate

    def __post_init__(self) -> None:
        self.room = self.request.sampling.max_tokens - len(self.request.generated_ids)

    @property
    def cuts(self) -> bool:
        """Whether tokens are drawn from a part of the vocabulary."""
        s = self.request.sampling
        return s.temperature > 0 and (s.top_p < 1 or s.top_k > 0 or s.min_p > 0)

    def context(self) -> tuple[int, ...]:
        """Returns all tokens so far, the prompt included."""
        return self.request.prompt_ids + self.request.generated_ids + tuple(self.tokens)

    def length(self) -> int:
        """Returns the number of tokens so far, the prompt included."""
        return len(self.request.prompt_ids) + len(self.request.generated_ids) + len(self.tokens)

    def place(self) -> int:
        """Returns how many tokens of its sequence were sampled, in earlier turns too: where the noise continues."""
        return self.request.position + len(self.request.generated_ids) + len(self.tokens)

    def left(self) -> int:
        """Returns how many tokens the job can still generate."""
        return self.room - len(self.tokens)

    def seed(self) -> int:
        """Returns 63 bits of the request's noise, for engines with a generator per request; see `seed_of`."""
        return seed_of(self.request, len(self.tokens))

    def limit(self) -> int:
        """Returns the largest number of tokens that the whole sequence can reach."""
        return len(self.request.prompt_ids) + self.request.sampling.max_tokens

    def take(self, token: int, logp: float) -> str | None:
        """Adds a token; returns why the request has ended with it, or None."""
        self.tokens.append(token)
        self.logps.append(logp)
        if token in self.request.sampling.stop_token_ids:
            return "stop"
        if self.stop_text is not None and self.stop_text.ends_with(token):
            return "stop"
        return "length" if len(self.tokens) >= self.room else None

    def result(self, reason: str, replica: int = 0) -> Result:
        """Returns the result so far, of this replica; versions under which no token was sampled have no span."""
        starts = [start for _, start in self.versions] + [len(self.tokens)]
        spans = [Span(v, a, b) for (v, a), b in zip(self.versions, starts[1:]) if a < b]
        support = None
        if self.supports and any(map(len, self.supports)):
            support = Support([len(ids) for ids in self.supports], torch.cat(self.supports).tolist())
        return Result(self.handle, self.tokens, self.logps, reason, spans, support, replica)  # type: ignore[arg-type]


def check_request(request: Request, *, decodes: bool, max_model_len: int | None = None) -> None:
    """Refuses a request that can never run, whatever the engine.

    Args:
        request: the request.
        decodes: whether the engine can turn tokens to text.
        max_model_len: most tokens of a sequence that it was started with; None: the engine checks that itself.

    Raises:
        UserError: nothing is left to generate, it does not fit, or its end needs a text.
    """
    sampling, prompt, done = request.sampling, len(request.prompt_ids), len(request.generated_ids)
    if not prompt or done >= sampling.max_tokens:
        raise UserError(
            f"a request with {prompt} prompt tokens, {done} generated ones and max_tokens {sampling.max_tokens} leaves "
            "nothing to do",
            fix="give a prompt, and more max_tokens than are generated already",
        )
    if max_model_len is not None and prompt + sampling.max_tokens > max_model_len:
        raise UserError(
            f"a request of {prompt} prompt tokens and up to {sampling.max_tokens} new ones does not fit in "
            f"{max_model_len} tokens",
            why="that is the max_model_len which the engine was started with",
            fix="lower rollout.max_response_tokens or data.max_prompt_tokens, or start it with a larger one",
        )
    if not decodes and (sampling.stop or sampling.stop_regex is not None):
        raise UserError("stop texts need an engine that can decode", fix="give it decode=")


def seed_of(request: Request, new: int = 0) -> int:
    """Returns 63 bits of a request's noise; at a later place of the sequence they differ.

    torch's CPU generator takes the low 32 of them: among 100,000 requests about one pair shares its noise.

    Args:
        request: the request.
        new: how many tokens it has generated beside its `generated_ids`.
    """
    key, first = request.noise, request.position + len(request.generated_ids) + new
    if first:
        key = NoiseKey(key.bits(), "continued", draw=first)
    return key.bits() & (2**63 - 1)
