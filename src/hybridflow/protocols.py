"""The two engine protocols and the small records they exchange.

Everything between rooms goes through these: a training engine, a generation engine, and the weights that travel from
one to the other. Implementations live in `engines/` and `rollout/`; nothing here knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:  # processes that score answers do without torch
    import torch
    from torch import Tensor

    from hybridflow.batch import Batch
    from hybridflow.noise import NoiseKey

SECONDS_BETWEEN_LOOKS = 0.2  # of a `wait` that something else wakes: see `Interruptible`

# --- generation ---


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Args:
        max_tokens: most tokens to generate (a stop token counts).
        temperature: divides the logits; 0 takes the most likely token.
        stop_token_ids: generation ends with the first of these, which is kept as the last token.
        top_p: keeps the smallest set of most likely tokens whose probabilities add up to at least this; 1 keeps all.
        top_k: keeps so many most likely tokens; 0 keeps all.
        min_p: keeps tokens at least this share as likely as the most likely one; 0 keeps all.
        stop: generation ends with the token that completes the first of these texts; that token is kept.
        stop_regex: the same for a regular expression, searched in the text generated so far; None for none.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that the prompt or the
            answer holds already (arXiv 1909.05858); 1 does nothing.
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
    """One trajectory to generate.

    Args:
        prompt_ids: token ids of the prompt. Requests with equal prompts share one prefill.
        sampling: how to draw.
        noise: whose noise the tokens take.
        generated_ids: tokens already generated (by an aborted request); generation goes on after them, and noise and
            `max_tokens` count from the first of them. The result holds only what is new.
        adapter: name of the adapter to generate with; None is the plain model.
        images: what the image tokens of the prompt stand for, in order (PIL images); vision-language models only.
        replica: which of the engine's replicas must answer; None: any.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    noise: NoiseKey
    generated_ids: tuple[int, ...] = ()
    adapter: str | None = None
    images: tuple[Any, ...] = ()
    replica: int | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``start <= t < end`` of a result were sampled under weight version `version`."""

    version: int
    start: int
    end: int


@dataclass(slots=True)
class Support:
    """Which tokens could have been sampled (top-p, top-k, min-p), one after the other: ragged, not a mask over V.

    Args:
        sizes: for each token of the answer, how many ids were kept; 0 stands for the whole vocabulary.
        ids: the kept ids of all tokens, end to end; the sampled token is always among its own.
    """

    sizes: list[int]
    ids: list[int]


@dataclass(slots=True)
class Result:
    """What became of a request.

    Args:
        handle: what `submit` returned.
        token_ids: generated tokens.
        logps: log-probability of each token under the distribution it was really sampled from (after temperature;
            for greedy decoding, under the model's own distribution at temperature 1).
        finish_reason: "stop" (a stop token, the last one), "length" (`max_tokens`), or "abort" (the part done so far).
        spans: weight versions of the tokens, in order, covering all of them.
        support: what could have been sampled; None where that was the whole vocabulary throughout.
    """

    handle: int
    token_ids: list[int]
    logps: list[float]
    finish_reason: Literal["stop", "length", "abort"]
    spans: list[Span]
    support: Support | None = None


# --- groups ---


@dataclass(slots=True)
class Trajectory:
    """A finished answer and what it was worth.

    Args:
        sample: which answer to its prompt this is.
        token_ids: generated tokens.
        logps: see `Result.logps`.
        finish_reason: see `Result.finish_reason`.
        spans: see `Result.spans`.
        response: the tokens as text, without special tokens.
        reward: what the reward gave for the whole answer.
        support: see `Result.support`.
        components: further numbers that the reward gave, by name.
        step_rewards: rewards of parts of the answer, each on the token (of `token_ids`) that its part ends with.
        failure: why there is no reward; None where there is one. The answer then carries no loss.
    """

    sample: int
    token_ids: list[int]
    logps: list[float]
    finish_reason: str
    spans: list[Span]
    response: str
    reward: float
    support: Support | None = None
    components: dict[str, float] = field(default_factory=dict)
    step_rewards: list[tuple[int, float]] = field(default_factory=list)
    failure: str | None = None


@dataclass(slots=True)
class Group:
    """All answers to one draw of a prompt.

    Args:
        draw: number of the draw, unique over the run.
        row: index of the row in the data.
        prompt_ids: token ids of the prompt.
        trajectories: the answers, in order of `sample`.
        baseline: the reward of a greedy answer to the prompt; None where none was asked for.
        failures: how many of its answers (a greedy one too) the reward failed on, by what happened: see `Score.kind`.
    """

    draw: int
    row: int
    prompt_ids: list[int]
    trajectories: list[Trajectory]
    baseline: float | None = None
    failures: dict[str, int] = field(default_factory=dict)


# --- rewards ---


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to one prompt, to be scored.

    Args:
        responses: their texts.
        ground_truth: what they are compared with.
        prompt: the chat messages that they answer.
        row: the whole row of the data.
    """

    responses: list[str]
    ground_truth: Any
    prompt: list[dict[str, Any]]
    row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Score:
    """What an answer is worth.

    Args:
        value: the reward of the whole answer. Where it failed it is 0 and means nothing.
        components: further numbers, by name.
        steps: rewards of parts of the answer: (how many characters of it the part ends after, reward).
        failure: what went wrong, in words, where there is no reward.
        kind: of the failure: "raised", "timeout", "died" (its process), "nonsense" (what it returned), "refused" (a
            server); "" where there is none.
    """

    value: float
    components: dict[str, float] = field(default_factory=dict)
    steps: tuple[tuple[int, float], ...] = ()
    failure: str | None = None
    kind: str = ""


class Grader(Protocol):
    """Scores answers while others are generated. Not thread-safe; one owner."""

    def submit(self, key: int, answers: Answers) -> None:
        """Begins to score. The key comes back with the scores; it must not be in use."""
        ...

    def ready(self) -> list[tuple[int, list[Score]]]:
        """What has been scored since, without waiting: for each key, a score for every response."""
        ...

    def wait(self) -> list[tuple[int, list[Score]]]:
        """The same, of at least one key; blocks until there is one. At once empty if nothing is submitted."""
        ...

    def cancel(self) -> None:
        """Forgets what has been submitted."""
        ...

    def check(self) -> None:
        """Makes sure that it can work, without scoring anything: servers answer, models and tools are there.

        Raises:
            UserError: it cannot.
        """
        ...

    def close(self) -> None:
        """Ends its processes and connections."""
        ...


# --- weights ---


@dataclass(slots=True)
class WeightStream:
    """Full tensors under Hugging Face names, one after the other.

    Args:
        tensors: (name, tensor) pairs; tied names are included. May be consumed once. A tensor is good until the next
            one is taken: whoever keeps it copies it.
        names: every name that a complete stream holds.
        published: fingerprint of each tensor as it left the trainer, filled while `tensors` is consumed.
        same_memory: the receiver holds these very tensors (a local actor); nothing needs to be copied.
        adapter: name of the adapter that this stream carries; None for the model's own weights.
    """

    tensors: Iterator[tuple[str, Tensor]]
    names: frozenset[str]
    published: dict[str, int] = field(default_factory=dict)
    same_memory: bool = False
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a generation engine says it received: held against what was published by `weights.stream.verify`.

    Args:
        version: weight version that the engine now samples from.
        received: fingerprint of each tensor as the engine got it.
        num_bytes: bytes received.
    """

    version: int
    received: Mapping[str, int]
    num_bytes: int


class RolloutEngine(Protocol):
    """Generates, per request and asynchronously: results come in order of completion."""

    def submit(self, request: Request) -> int:
        """Accepts a request and returns its handle at once.

        Raises:
            UserError: the request can never run (longer than the engine's context, unknown adapter).
        """
        ...

    def wait(self) -> list[Result]:
        """Blocks until at least one request has ended; returns those that ended since the last call.

        Returns an empty list only when nothing is in flight.
        """
        ...

    def abort(self, handles: Iterable[int]) -> list[Result]:
        """Ends requests; returns the part each has done, with reason "abort". Handles that ended before are ignored."""
        ...

    def pause(self) -> None:
        """Stops generating; what is in flight stays and goes on after `resume`."""
        ...

    def resume(self) -> None:
        """Goes on after `pause`."""
        ...

    def update_weights(self, stream: WeightStream, version: int) -> list[Receipt]:
        """Takes new weights. Requests in flight go on with them: their result then has several spans.

        Returns:
            A receipt of every process that took them. Whoever publishes holds them against the stream
            (`weights.stream.verify`); an engine does not.
        """
        ...

    def sleep(self) -> None:
        """Gives back memory (caches, weights where the engine owns a copy) until `wake`; nothing may be in flight."""
        ...

    def wake(self) -> None:
        """Takes memory again after `sleep`."""
        ...

    def close(self) -> None:
        """Ends the engine."""
        ...


@runtime_checkable
class DirectReceiver(Protocol):
    """What a `RolloutEngine` also offers whose own processes take weights from wherever they are sent."""

    def receivers(self) -> list[str]:
        """The host name of each process that takes weights."""
        ...

    def receive_weights(self, address: str, version: int) -> list[Receipt]:
        """Has every process take the stream that is sent at an address, as `RolloutEngine.update_weights` does.

        Args:
            address: of the sender: `weights.transport.open_receiver` opens it.
            version: of the weights.

        Returns:
            The receipt of every process, in the order of `receivers`.
        """
        ...


@runtime_checkable
class Restarting(Protocol):
    """What a `RolloutEngine` also offers that starts processes again which died.

    Attributes:
        version: of the weights that it samples from.
        on_restart: called after that, before lost requests are sent again: it publishes weights of `version`, for the
            new process has only those that it was started with.
    """

    version: int
    on_restart: Callable[[], object] | None


@runtime_checkable
class Interruptible(Protocol):
    """What a `RolloutEngine` or `Grader` also offers whose `wait` may come back before anything has ended.

    Attributes:
        should_return: asked now and then while `wait` waits; once it says yes, `wait` returns what there is.
    """

    should_return: Callable[[], bool]


@contextmanager
def returning_when(asked: Callable[[], bool], *parts: object) -> Iterator[None]:
    """Within, `wait` of each part that is `Interruptible` comes back early where `asked` says yes."""
    able = [part for part in parts if isinstance(part, Interruptible)]
    before = [part.should_return for part in able]
    for part in able:
        part.should_return = asked
    try:
        yield
    finally:
        for part, asked_before in zip(able, before):
            part.should_return = asked_before


def never() -> bool:
    """What `Interruptible` parts ask unless they are told: they wait to the end."""
    return False


def generate(engine: RolloutEngine, requests: Sequence[Request]) -> list[Result]:
    """Runs requests to their end and returns their results in the order of the requests."""
    handles = [engine.submit(r) for r in requests]
    done: dict[int, Result] = {}
    while len(done) < len(handles):
        done.update({r.handle: r for r in engine.wait()})
    return [done[h] for h in handles]


# --- training ---


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss by name and parameters: it travels to worker processes, where the function is looked up."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Update:
    """What one optimizer step did.

    Args:
        metrics: loss, gradient norm, learning rate, ... (sums already divided).
        applied: False when the loss or the gradient was not finite: weights and optimizer are then untouched.
        bad_rows: indices of the sequences whose own loss was not finite.
    """

    metrics: dict[str, float]
    applied: bool = True
    bad_rows: list[int] = field(default_factory=list)


class Scorer(Protocol):
    """Scores tokens; owns its micro-batches, so the result never depends on how a batch is cut."""

    def score(self, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, Tensor]:
        """Per-token columns under the current weights, without gradients.

        Args:
            batch: needs ``input_ids_T`` and ``loss_mask_T``; only masked-in tokens are scored, others are 0.
            outputs: of "logp" (``logp_T``), "entropy" (``entropy_T``), "sum_pi_squared" (``sum_pi_squared_T``, the sum
                over the words of their squared probabilities), "log_mass" (``log_mass_T``, the log-probability of
                all words that a token was drawn from), and of a critic "value" (``value_T``).
            temperature: divides the logits first.
        """
        ...


class TrainEngine(Scorer, Protocol):
    """Trains; owns its micro-batches too."""

    def update(self, batch: Batch, loss: Loss) -> Update:
        """One optimizer step on the sum over tokens of weight x loss: see `algorithms.aggregation`. None if empty."""
        ...

    def save(self, folder: Path, *, background: bool = False) -> None:
        """Writes weights and all else that is needed to go on bit for bit.

        Args:
            folder: an existing, empty folder; of a sharded engine, the same on every process, which all call this.
            background: copy what is to be written, and write it while the engine goes on; see `saved`.
        """
        ...

    def saved(self, *, wait: bool) -> bool:
        """Whether the last `save` has written all of its files; with `wait`, waits for it. It must be, before the next.

        Raises:
            OSError: or whatever else kept it from writing.
        """
        ...

    def load(self, folder: Path) -> None:
        """Goes on from what any engine of the same model saved.

        Raises:
            UserError: it is of another model.
        """
        ...

    def export(self, folder: Path, dtype: torch.dtype = ...) -> None:
        """Writes the model alone as a plain Hugging Face folder without a tokenizer; adapters are merged.

        Args:
            folder: an existing, empty folder.
            dtype: precision of the written weights; float32 where none is given.
        """
        ...

    def stream_weights(self, *, lora: Literal["adapters", "merged"] | None = None) -> WeightStream:
        """The current weights, under Hugging Face names; of a sharded engine, all processes consume it together.

        Args:
            lora: "adapters" alone; "merged" into plain weights; None: both beside each other.
        """
        ...

    def perturb(self, names: Collection[str] | None = None) -> None:
        """Changes every element of every tensor that is published, in place; a second call puts all back bit for bit.

        See `weights.drill`. Nothing is trained or saved in between.

        Args:
            names: of tensors, as they are published (tied ones by their first name), that alone are changed.
        """
        ...

    def to(self, where: Literal["device", "host"]) -> None:
        """Moves weights and optimizer state to the accelerator or to host memory."""
        ...
