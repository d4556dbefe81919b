"""A request on its way through an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybridflow.protocols import Request, Result, Span


@dataclass(slots=True)
class Job:
    """What a request has generated so far, and which weights each part came from.

    Args:
        handle: what `submit` returned.
        request: the request.
        versions: (weight version, index of the first token sampled under it), in order.
        tokens: generated tokens.
        logps: their log-probabilities.
    """

    handle: int
    request: Request
    versions: list[tuple[int, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)

    def context(self) -> tuple[int, ...]:
        """All tokens so far, the prompt included."""
        return self.request.prompt_ids + self.request.generated_ids + tuple(self.tokens)

    def limit(self) -> int:
        """Tokens that the whole sequence can have in the end."""
        return len(self.request.prompt_ids) + self.request.sampling.max_tokens

    def result(self, reason: str) -> Result:
        """The result as it stands; versions under which no token was sampled have no span."""
        starts = [start for _, start in self.versions] + [len(self.tokens)]
        spans = [Span(v, a, b) for (v, a), b in zip(self.versions, starts[1:]) if a < b]
        return Result(self.handle, self.tokens, self.logps, reason, spans)  # type: ignore[arg-type]
