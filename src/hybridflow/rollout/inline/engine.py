"""Generation with a model of the training process itself: the one being trained, on the same memory, or a replica.

Sequences enter and leave the running batch one by one: a finished one leaves at once (the last row of the cache takes
its place), a waiting one enters as soon as the token budget allows. Requests with the same prompt share its prefill.
Noise is stateless, so a sequence's tokens do not depend on what it was batched with, up to rounding. Runs with several
turns keep the keys and values of a turn for the next one (`kept.py`).

Families that `decoder.py` covers run through it, all others (and models with adapters) through their own modules.
Models that do not take packed sequences have no cache: every token costs a pass over the whole sequence.

Shapes: R running rows, T tokens of a prefill, C hidden size, V vocabulary.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.errors import UserError
from hybridflow.models.attention import Layout, PackedLayout
from hybridflow.models.forward import packs, trunk
from hybridflow.models.head import output_head
from hybridflow.models.load import context_of
from hybridflow.models.padded import padded_states
from hybridflow.protocols.generation import Request, Result
from hybridflow.protocols.waiting import never
from hybridflow.protocols.weights import Receipt, WeightStream
from hybridflow.rollout.inline.cache import Cache, CacheLayout, Kept
from hybridflow.rollout.inline.decoder import Decoder, Steps, is_covered
from hybridflow.rollout.inline.kept import ContinuedLayout, KeptTurn, KeptTurns
from hybridflow.rollout.job import Decode, Job, check_request
from hybridflow.rollout.sampling import Rows, check_sampling
from hybridflow.rollout.stopping import StopText
from hybridflow.weights.stream import copy_weights, fingerprint

PREFILL_TOKENS = 8192  # most prompt tokens in one prefill; bounds its activations
WIDTH_STEP = 16  # cache widths are multiples of this


def require_room(model: PreTrainedModel, prompt_tokens: int, max_tokens: int, max_cache_tokens: int) -> None:
    """Raises a UserError if a prompt and its longest response do not fit the model's context or the engine's cache."""
    room = room_of(model, max_cache_tokens)
    if prompt_tokens + max_tokens > room:
        raise UserError(
            f"a request of {prompt_tokens} prompt tokens and up to {max_tokens} new ones does not fit in {room} tokens",
            why=f"the model's context is {context_of(model)}, the cache's bound {max_cache_tokens}",
            fix="lower rollout.max_response_tokens or data.max_prompt_tokens, or raise rollout.max_cache_tokens",
        )


def room_of(model: PreTrainedModel, max_cache_tokens: int) -> int:
    """Returns the most tokens of a sequence that fit the model's context and the engine's cache."""
    return min(context_of(model) or max_cache_tokens, max_cache_tokens)


class InlineEngine:
    """A `RolloutEngine` that runs a module of its process.

    Args:
        model: a model that `models.load` loaded: the trainer's own, whose weight streams are of the same memory, or a
            replica, which takes weights from other streams.
        max_cache_tokens: bound on the key-value cache: rows x width never exceeds it.
        decode: token ids to text; needed by requests with stop strings only.
        dtype: what matrix products are computed in; None is bfloat16 on a GPU, the model's own type elsewhere.
        compile: whether the layers of a covered model go through `torch.compile`.
        quick: whether covered models run without their modules; False is for comparisons.
        same_memory: whether the model is the one of a trainer in this process.
        keep_turns: whether the keys and values of a turn are kept for the next turn of its sequence (a request with the
            same noise and the next `position`), as far as they fit beside those of running rows; `forget` and new
            weights drop them.
        count_near_ties: count in `near_ties` the tokens whose two best noisy scores are within 1e-4: the only ones
            that another batching may change.

    Attributes:
        tokens_read: tokens of prompts, and of turns before, that went through the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_cache_tokens: int = 262_144,
        decode: Decode | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        quick: bool = True,
        same_memory: bool = False,
        keep_turns: bool = False,
        count_near_ties: bool = False,
    ) -> None:
        self.model, self.decode, self.same_memory = model, decode, same_memory
        self.should_return: Callable[[], bool] = never
        self.on_restart: Callable[[], object] | None = None
        self.max_cache_tokens = max_cache_tokens
        self.dtype = dtype or (torch.bfloat16 if model.device.type == "cuda" else model.dtype)
        self.packs = packs(model)
        self.quick = quick and self.packs and is_covered(model)
        self.version = 0
        self.paused = False
        self.tokens_read = 0
        self._interrupted = threading.Event()
        self._kept = KeptTurns() if keep_turns and self.packs else None
        self._steps = Steps.compiled() if compile and self.quick else Steps()
        self._next_handle = 0
        self._waiting: deque[Job] = deque()
        self._ready: list[Result] = []
        self._rows = Rows(model.device, count_near_ties)
        self._cache: Cache | None = None
        self._decoder: Decoder | None = None

    replicas = 1
    cache_block = 0  # prompts that come together share a prefill, which is not kept for later ones

    @property
    def max_model_len(self) -> int:
        """See `RolloutEngine.max_model_len`."""
        return room_of(self.model, self.max_cache_tokens)

    @property
    def near_ties(self) -> int:
        """Tokens whose two best scores were nearly equal, if they are counted."""
        return self._rows.near_ties

    def submit(self, request: Request) -> int:
        """See `RolloutEngine.submit`."""
        job, sampling = Job(self._next_handle, request), request.sampling
        check_sampling(sampling, output_head(self.model).vocabulary())
        check_request(request, decodes=self.decode is not None)
        require_room(self.model, len(request.prompt_ids), request.sampling.max_tokens, self.max_cache_tokens)
        if sampling.stop or sampling.stop_regex is not None:
            assert self.decode is not None
            job.stop_text = StopText(sampling.stop, sampling.stop_regex, self.decode, request.generated_ids)
        self._next_handle += 1
        self._waiting.append(job)
        return job.handle

    def wait(self) -> list[Result]:
        """See `RolloutEngine.wait`."""
        assert not (self.paused and not self._ready), "waiting for a paused engine would never end"
        with torch.inference_mode(), self._autocast():
            while not self._ready and (self._waiting or self._rows.jobs):
                if self._interrupted.is_set() or self.should_return():
                    break
                self._admit()
                if self._rows.jobs:
                    self._decode()
        self._interrupted.clear()
        return self.poll()

    def interrupt(self) -> None:
        """See `RolloutEngine.interrupt`; checked before every decoding step."""
        self._interrupted.set()

    def poll(self) -> list[Result]:
        """See `RolloutEngine.poll`."""
        ready, self._ready = self._ready, []
        return ready

    def abort(self, handles: Iterable[int]) -> list[Result]:
        """See `RolloutEngine.abort`."""
        wanted = set(handles)
        ended = [job for job in self._waiting if job.handle in wanted]
        self._waiting = deque(job for job in self._waiting if job.handle not in wanted)
        rows = [r for r, job in enumerate(self._rows.jobs) if job.handle in wanted]
        ended += [self._rows.jobs[r] for r in rows]
        with torch.inference_mode():  # the cache's tensors were made in this mode
            self._leave(rows)
        return [job.result("abort") for job in ended]

    def pause(self) -> None:
        """See `RolloutEngine.pause`."""
        self.paused = True

    def resume(self) -> None:
        """See `RolloutEngine.resume`."""
        self.paused = False

    def update_weights(self, stream: WeightStream, version: int) -> list[Receipt]:
        """See `RolloutEngine.update_weights`. What is in flight is prefilled again: no cache of old weights stays.

        Raises:
            WeightSyncError: the stream is of another model than this one, or ends too early.
        """
        if stream.same_memory:
            own = self.model.state_dict()
            received, num_bytes = {n: fingerprint(own[n]) for n, _ in stream.tensors if n in own}, 0
        else:
            received, num_bytes = copy_weights(stream, self.model.state_dict())
        self._waiting.extendleft(reversed(self._rows.jobs))
        self._rows.keep([])
        self._free()
        self.forget()
        self.version = version
        return [Receipt(version, received, num_bytes)]

    def receivers(self) -> list[str]:
        """See `RolloutEngine.receivers`: weights come through `update_weights`."""
        return []

    def receive_weights(self, address: str, version: int) -> list[Receipt]:
        """Raises an error: there are no `receivers`, so nothing may call it."""
        raise AssertionError("the inline engine takes streams of its own process")

    def read_back(self, names: Sequence[str]) -> dict[str, int]:
        """See `RolloutEngine.read_back`."""
        own = self.model.state_dict()
        return {name: fingerprint(own[name]) for name in names if name in own}

    def forget(self) -> None:
        """See `RolloutEngine.forget`."""
        if self._kept is not None:
            self._kept.shrink(0)

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`; with nothing in flight there is no cache, and no copy of weights."""
        assert not (self._rows.jobs or self._waiting), "sleep with requests in flight"
        self.forget()

    def wake(self) -> None:
        """See `RolloutEngine.wake`; the cache is made when the first request runs."""

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._free()
        self.forget()

    # --- the running batch ---

    def _admit(self) -> None:
        """Moves waiting jobs into the batch as far as the budget allows, and samples their first token."""
        width, running = self._cache.width if self._cache else 0, len(self._rows.jobs)
        admitted: list[Job] = []
        prefill: dict[tuple[int, ...], int] = {}  # distinct contexts, in order of first appearance
        turns: list[KeptTurn | None] = []  # what is kept of each
        which: list[int] = []
        tokens = 0
        while self._waiting:
            job = self._waiting[0]
            rounded = -(-job.limit() // WIDTH_STEP) * WIDTH_STEP
            wider = max(width, min(rounded, self.max_cache_tokens))
            rows = running + len(admitted) + 1
            if rows > 1 and rows * wider > self.max_cache_tokens:
                break
            context = job.context()
            if context not in prefill:
                if prefill and tokens + len(context) > PREFILL_TOKENS:
                    break
                prefill[context] = len(prefill)
                turns.append(None if self._kept is None else self._kept.take(job))
                tokens += len(context) - len(turns[-1].ids if turns[-1] else ())
            width = wider
            which.append(prefill[context])
            job.versions.append((self.version, len(job.tokens)))
            admitted.append(self._waiting.popleft())
        if not admitted:
            return
        logits_RV = self._prefill(list(prefill), turns, torch.tensor(which), width)
        self._rows.enter(admitted)
        self._draw(logits_RV, running)

    def _prefill(
        self, contexts: list[tuple[int, ...]], turns: list[KeptTurn | None], which: Tensor, width: int
    ) -> Tensor:
        """Runs distinct contexts once, all but what is kept of them, copies keys and values to each row; returns each
        row's logits ``[R, V]``.
        """
        device, running = self.model.device, len(self._rows.jobs)
        if not self.packs:
            return self._whole(contexts)[which.to(device)]
        kept: list[tuple[Tensor, Tensor]] = []
        lengths = torch.tensor([len(c) for c in contexts])
        layout: PackedLayout | ContinuedLayout
        if any(turns):
            layout = ContinuedLayout(lengths, turns, device, kept)
            contexts = [c[len(turn.ids) :] if turn else c for c, turn in zip(contexts, turns)]
        else:
            layout = PackedLayout(lengths, device, keep=kept)
        ids_T = torch.tensor([t for c in contexts for t in c], device=device)
        ends = torch.tensor([len(c) for c in contexts], device=device).cumsum(0) - 1
        self.tokens_read += len(ids_T)
        logits = self._forward(ids_T, layout.position_ids[0], layout, ends)
        cache = self._reserve(running + len(which), width, kept)
        cache.store(kept, layout.offsets, which, running)
        return logits[which.to(device)]

    def _decode(self) -> None:
        """Runs one forward pass for all running rows: their last token in, their next one out."""
        rows = self._rows
        if not self.packs:
            return self._draw(self._whole([job.context() for job in rows.jobs]), 0)
        assert self._cache is not None
        layout = CacheLayout(self._cache, rows.length_R)
        self._draw(self._forward(rows.last_R, rows.length_R - 1, layout), 0)

    def _forward(self, ids_T: Tensor, position_T: Tensor, layout: Layout, ends: Tensor | None = None) -> Tensor:
        """Computes logits after tokens `ends` of a prefill ``[len(ends), V]``, or every row's token ``[R, V]``."""
        if self.quick:
            if self._decoder is None:
                self._decoder = Decoder(self.model, self.dtype, self._steps)
            hidden_TC = self._decoder.hidden(ids_T, position_T, layout, packed=ends is not None)
            return self._decoder.logits(hidden_TC if ends is None else hidden_TC[ends])
        ids, positions = (x[:, None] if ends is None else x[None] for x in (ids_T, position_T))
        logits = self.model(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=0 if ends is None else ends,
            layout=layout,
        ).logits
        return logits[:, 0] if ends is None else logits[0]

    def _whole(self, contexts: list[tuple[int, ...]]) -> Tensor:
        """Computes logits after whole sequences ``[len(contexts), V]``, for a model without a layout: nothing is
        cached.
        """
        lengths = torch.tensor([len(c) for c in contexts])
        ids_T = torch.tensor([t for c in contexts for t in c], device=self.model.device)
        states_TC = padded_states(trunk(self.model), ids_T, lengths)
        return output_head(self.model).logits(states_TC[(lengths.cumsum(0) - 1).to(ids_T.device)])

    def _draw(self, logits_RV: Tensor, first: int) -> None:
        """Samples the next token of the rows from `first` on, and lets those leave that are done."""
        ended = self._rows.draw(logits_RV, first)
        self._ready += [self._rows.jobs[row].result(reason) for row, reason in ended]
        if self._kept is not None and self._cache is not None:
            for row, _ in ended:
                self._kept.put(self._rows.jobs[row], self._cache, row)
            self._kept.shrink(self.max_cache_tokens - self._cache.rows * self._cache.width)
        self._leave([row for row, _ in ended])

    def _leave(self, rows: list[int]) -> None:
        """Takes rows out of the batch; rows from its end move into the gaps."""
        if not rows:
            return
        jobs, gone = self._rows.jobs, set(rows)
        remaining = len(jobs) - len(rows)
        gaps = [r for r in rows if r < remaining]
        movers = [r for r in range(remaining, len(jobs)) if r not in gone]
        if movers and self._cache is not None:
            self._cache.move(movers, gaps, max(jobs[r].length() for r in movers))
        order = list(range(remaining))
        for source, target in zip(movers, gaps):
            order[target] = source
        self._rows.keep(order)
        if not remaining and not self._waiting:
            self._free()

    def _reserve(self, rows: int, width: int, kept: Kept) -> Cache:
        """Returns a cache of at least this many rows of this width, with the contents of the running rows."""
        old, running = self._cache, len(self._rows.jobs)
        if old is None or rows > old.rows or width > old.width:
            rows = max(rows, min(rows + len(self._waiting), self.max_cache_tokens // width))
            if self._kept is not None:
                self._kept.shrink(self.max_cache_tokens - rows * width)
            dtype = self.dtype if self.model.device.type == "cuda" else self.model.dtype
            self._cache = old = Cache(rows, width, kept, dtype, old, running)
        return old

    def _free(self) -> None:
        """Frees the memory of the cache and of copied weights, mainly for training."""
        self._cache = self._decoder = None

    def _autocast(self) -> AbstractContextManager[None]:
        if self.quick or self.dtype == self.model.dtype:
            return nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.dtype)
