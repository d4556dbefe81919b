"""The protocol of engines that generate, and the records of requests and results.

Implementations live in `rollout/` and `placing/`; this module imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hybridflow.protocols.weights import Receipt, WeightStream

if TYPE_CHECKING:  # processes that score responses do not import torch
    from hybridflow.noise import NoiseKey


# --- generation ---


@dataclass(frozen=True, slots=True)
class Sampling:
    """The settings with which tokens are drawn.

    Args:
        max_tokens: most tokens to generate (a stop token counts).
        temperature: divides the logits; 0 takes the most likely token.
        stop_token_ids: generation ends with the first of these, which is kept as the last token.
        top_p: keeps the smallest set of most likely tokens whose probabilities add up to at least this; 1 keeps all.
        top_k: keeps this many most likely tokens; 0 keeps all.
        min_p: keeps tokens at least this share as likely as the most likely one; 0 keeps all.
        stop: generation ends with the token that completes the first of these texts; that token is kept.
        stop_regex: the same for a regular expression, searched in the text generated so far; None for none.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that the prompt or the
            response holds already (arXiv 1909.05858); 1 does nothing.
        logit_bias: (token id, value) pairs added to the logits.
    """

    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_regex: str | None = None
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One turn to generate: all that a single-turn response is, or the next turn of a longer sequence.

    Args:
        prompt_ids: token ids of the prompt. Requests with equal prompts share one prefill.
        sampling: how to draw.
        noise: the key of the tokens' noise.
        generated_ids: tokens already generated (by an aborted request); generation continues after them, and noise and
            `max_tokens` count from the first of them. The result holds only what is new.
        images: what the image tokens of the prompt stand for, in order (PIL images); vision-language models only.
        replica: which of the engine's replicas must take the request; None: any. A replica that was evicted since
            takes nothing: any other does.
        position: tokens of this sequence that the model sampled before this request (they are part of `prompt_ids`).
            The noise continues at it: a later turn never repeats the noise of an earlier one, and draws what one long
            request would draw at these positions where noise is a function of the position (inline, SGLang).
            `max_tokens` and stop texts see the tokens of this request alone.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    noise: NoiseKey
    generated_ids: tuple[int, ...] = ()
    images: tuple[Any, ...] = ()
    replica: int | None = None
    position: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``start <= t < end`` of a result were sampled under weight version `version`."""

    version: int
    start: int
    end: int


@dataclass(slots=True)
class Support:
    """The tokens that could have been sampled (top-p, top-k, min-p), one after the other: ragged, not a mask over V.

    Args:
        sizes: for each token of the response, how many ids were kept; 0 stands for the whole vocabulary.
        ids: the kept ids of all tokens, end to end; the sampled token is always among its own.
    """

    sizes: list[int]
    ids: list[int]


@dataclass(slots=True)
class Result:
    """The result of a request.

    Args:
        handle: what `submit` returned.
        token_ids: generated tokens.
        logps: log-probability of each token under the distribution that it was sampled from (after temperature; for
            greedy decoding, under the model's own distribution at temperature 1).
        finish_reason: "stop" (a stop token, the last one), "length" (`max_tokens`), or "abort" (the part done so far).
        spans: weight versions of the tokens, in order, covering all of them.
        support: the tokens that could have been sampled; None where that was the whole vocabulary throughout.
        replica: which of the engine's replicas generated it, and may have its beginning in a cache: as
            `Request.replica`, it sends the next turn there.
    """

    handle: int
    token_ids: list[int]
    logps: list[float]
    finish_reason: Literal["stop", "length", "abort"]
    spans: list[Span]
    support: Support | None = None
    replica: int = 0


class RolloutEngine(Protocol):
    """Generates, per request and asynchronously: results come in order of completion.

    An engine states what it can do in attributes and methods, each of which has a value for "not supported". Callers
    read these, and never ask for its class.

    Attributes:
        should_return: called now and then while `wait` waits; when it returns True, `wait` returns what has ended.
        on_restart: called where processes that died were started again, before lost requests are sent again. It
            publishes weights of `version`, because the new processes have only those that they were started with. An
            engine that starts nothing again never calls it.
    """

    should_return: Callable[[], bool]
    on_restart: Callable[[], object] | None

    @property
    def version(self) -> int:
        """The version of the weights that it samples from."""
        ...

    @property
    def replicas(self) -> int:
        """The number of replicas, each with weights of its own; `Request.replica` counts them."""
        ...

    @property
    def max_model_len(self) -> int:
        """The most tokens of a sequence, prompt and response together; `submit` refuses longer ones."""
        ...

    @property
    def cache_block(self) -> int:
        """The tokens of a block of the prefix cache; 0 where no prompt is ever taken from one."""
        ...

    @property
    def same_memory(self) -> bool:
        """Whether it computes with the tensors of a trainer in this process: then no weights travel."""
        ...

    def submit(self, request: Request) -> int:
        """Accepts a request and returns its handle at once.

        Raises:
            UserError: the request can never run (longer than the engine's context).
        """
        ...

    def wait(self) -> list[Result]:
        """Blocks until at least one request has ended; returns those that ended since the last call.

        Returns an empty list only when nothing is in flight, after `interrupt`, or because of `should_return`.
        """
        ...

    def interrupt(self) -> None:
        """Makes `wait` return soon, with what has ended or with nothing; requests in flight stay in flight.

        Any thread may call it, at any time: the `wait` that runs returns, else the next one. One call ends one `wait`;
        calls before that `wait` returns count as one. It ends no `wait` of another caller inside `on_restart`.
        """
        ...

    def poll(self) -> list[Result]:
        """Returns what `wait` would return at once; an engine that computes inside `wait` alone does nothing else."""
        ...

    def abort(self, handles: Iterable[int]) -> list[Result]:
        """Ends requests; returns the part each has done, with reason "abort". Handles that ended before are ignored."""
        ...

    def pause(self) -> None:
        """Stops generating; requests in flight stay and continue after `resume`."""
        ...

    def resume(self) -> None:
        """Continues after `pause`."""
        ...

    def update_weights(self, stream: WeightStream, version: int) -> list[Receipt]:
        """Takes new weights. Requests in flight continue with them: their result then has several spans.

        Returns:
            A receipt of every process that took them. The publisher compares them with the stream
            (`weights.stream.verify`); an engine does not.
        """
        ...

    def receivers(self) -> list[str]:
        """Returns the host name of each process that takes weights from a sender; empty: there is none."""
        ...

    def receive_weights(self, address: str, version: int) -> list[Receipt]:
        """Has every process of `receivers` take the stream that is sent at an address, as `update_weights` does.

        Args:
            address: of the sender: `weights.transport.open_receiver` opens it.
            version: of the weights.

        Returns:
            The receipt of every process, in the order of `receivers`.
        """
        ...

    def read_back(self, names: Sequence[str]) -> dict[str, int]:
        """Returns the fingerprints of weights as they lie in its memory now.

        Args:
            names: names of tensors, as they are published.

        Returns:
            Those that it holds as they were published; empty: it can read none.

        Raises:
            WeightSyncError: two of its processes hold different values of one.
        """
        ...

    def forget(self) -> None:
        """Drops what was computed for earlier turns, where it is kept for turns to come and training needs the memory.

        Results never depend on it, up to rounding. Engines with a prefix cache in memory of their own do nothing.
        """
        ...

    def sleep(self) -> None:
        """Frees memory (caches, weights where the engine owns a copy) until `wake`; nothing may be in flight."""
        ...

    def wake(self) -> None:
        """Takes memory again after `sleep`."""
        ...

    def close(self) -> None:
        """Ends the engine."""
        ...


def generate(engine: RolloutEngine, requests: Sequence[Request]) -> list[Result]:
    """Runs requests to their end and returns their results in the order of the requests."""
    handles = [engine.submit(r) for r in requests]
    done: dict[int, Result] = {}
    while len(done) < len(handles):
        done.update({r.handle: r for r in engine.wait()})
    return [done[h] for h in handles]
