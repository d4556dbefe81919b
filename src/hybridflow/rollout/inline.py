"""Generation in the training process, with the model being trained, on the same memory.

Sequences enter and leave the running batch one by one: a finished one leaves at once (the last row of the cache takes
its place), a waiting one enters as soon as the token budget allows. Requests with the same prompt share its prefill.
Noise is stateless, so a sequence's tokens do not depend on what it was batched with, up to rounding.

Shapes: R running rows, V vocabulary, H query heads, K key-value heads, G = H / K, D head size, W cache width in tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.errors import UserError
from hybridflow.models.attention import PackedLayout
from hybridflow.noise import gumbel
from hybridflow.protocols import Receipt, Request, Result, WeightStream
from hybridflow.rollout.job import Job
from hybridflow.weights.stream import fingerprint

PREFILL_TOKENS = 8192  # most prompt tokens in one prefill; bounds its activations
WIDTH_STEP = 32  # cache widths are multiples of this
NEAR_TIE = 1e-4


class InlineEngine:
    """A `RolloutEngine` that runs the trainer's own module.

    Args:
        model: a model that `models.load` loaded, shared with the trainer.
        max_cache_tokens: bound on the key-value cache: rows x width never exceeds it.
        count_near_ties: count in `near_ties` the tokens whose two best noisy scores are within 1e-4: the only ones
            that another batching may change.
    """

    def __init__(
        self, model: PreTrainedModel, *, max_cache_tokens: int = 262_144, count_near_ties: bool = False
    ) -> None:
        self.model = model
        self.max_cache_tokens = max_cache_tokens
        self.count_near_ties = count_near_ties
        self.near_ties = 0
        self.version = 0
        self.paused = False
        self._next_handle = 0
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []  # row r of the state belongs to _running[r]
        self._ready: list[Result] = []
        self._state: _State | None = None

    def submit(self, request: Request) -> int:
        """See `RolloutEngine.submit`."""
        job = Job(self._next_handle, request)
        context = getattr(self.model.config, "max_position_embeddings", None)
        room = min(context or self.max_cache_tokens, self.max_cache_tokens)
        if not request.prompt_ids or len(request.generated_ids) >= request.sampling.max_tokens:
            raise UserError(
                f"a request with {len(request.prompt_ids)} prompt tokens, {len(request.generated_ids)} generated ones "
                f"and max_tokens {request.sampling.max_tokens} leaves nothing to do",
                fix="give a prompt, and more max_tokens than are generated already",
            )
        if job.limit() > room:
            raise UserError(
                f"a request of {len(request.prompt_ids)} prompt tokens and up to {request.sampling.max_tokens} new "
                f"ones does not fit in {room} tokens",
                why=f"the model's context is {context}, the cache's bound {self.max_cache_tokens}",
                fix="lower rollout.max_response_tokens or data.max_prompt_tokens, or raise rollout.max_cache_tokens",
            )
        if request.adapter is not None:
            raise UserError(f"the inline engine has no adapter {request.adapter!r}; it samples from the trained model")
        self._next_handle += 1
        self._waiting.append(job)
        return job.handle

    def wait(self) -> list[Result]:
        """See `RolloutEngine.wait`."""
        assert not (self.paused and not self._ready), "waiting for a paused engine would never end"
        with torch.inference_mode(), self._autocast():
            while not self._ready and (self._waiting or self._running):
                self._admit()
                if self._running:
                    self._decode()
        ready, self._ready = self._ready, []
        return ready

    def abort(self, handles: Iterable[int]) -> list[Result]:
        """See `RolloutEngine.abort`."""
        wanted = set(handles)
        ended = [job for job in self._waiting if job.handle in wanted]
        self._waiting = deque(job for job in self._waiting if job.handle not in wanted)
        rows = [r for r, job in enumerate(self._running) if job.handle in wanted]
        ended += [self._running[r] for r in rows]
        with torch.inference_mode():  # the state's tensors were made in it
            self._leave(rows)
        return [job.result("abort") for job in ended]

    def pause(self) -> None:
        """See `RolloutEngine.pause`."""
        self.paused = True

    def resume(self) -> None:
        """See `RolloutEngine.resume`."""
        self.paused = False

    def update_weights(self, stream: WeightStream, version: int) -> Receipt:
        """See `RolloutEngine.update_weights`. What is in flight is prefilled again: no cache of old weights stays."""
        own = self.model.state_dict()
        received: dict[str, int] = {}
        num_bytes = 0
        with torch.no_grad():
            for name, tensor in stream.tensors:
                if name not in own:
                    continue  # the receipt will lack it, and verification says so
                if not stream.same_memory:
                    own[name].copy_(tensor)
                    num_bytes += tensor.nbytes
                received[name] = fingerprint(own[name])
        for row, job in enumerate(self._running):
            self._collect(job, row)
        self._waiting.extendleft(reversed(self._running))
        self._running, self._state = [], None
        self.version = version
        return Receipt(version, received, num_bytes)

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        assert not (self._running or self._waiting), "sleep with requests in flight"
        self._state = None

    def wake(self) -> None:
        """See `RolloutEngine.wake`; the cache is made when the first request runs."""

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._state = None

    # --- the running batch ---

    def _admit(self) -> None:
        """Moves waiting jobs into the batch as far as the budget allows, and samples their first token."""
        width = self._state.width if self._state else 0
        admitted: list[Job] = []
        prefill: dict[tuple[int, ...], int] = {}  # distinct contexts, in order of first appearance
        tokens = 0
        while self._waiting:
            job = self._waiting[0]
            rounded = -(-job.limit() // WIDTH_STEP) * WIDTH_STEP
            wider = max(width, min(rounded, self.max_cache_tokens))
            rows = len(self._running) + len(admitted) + 1
            if rows > 1 and rows * wider > self.max_cache_tokens:
                break
            context = job.context()
            if context not in prefill:
                if prefill and tokens + len(context) > PREFILL_TOKENS:
                    break
                prefill[context] = len(prefill)
                tokens += len(context)
            width = wider
            job.versions.append((self.version, len(job.tokens)))
            admitted.append(self._waiting.popleft())
        if not admitted:
            return
        self._reserve(len(self._running) + len(admitted), width)
        assert self._state is not None
        which = torch.tensor([prefill[job.context()] for job in admitted])
        logits_RV = self._prefill(list(prefill), which)
        first = len(self._running)
        self._running += admitted
        self._state.enter(admitted, first)
        self._take_tokens(logits_RV, first)

    def _prefill(self, contexts: list[tuple[int, ...]], which: Tensor) -> Tensor:
        """Runs distinct contexts once and copies their keys and values to each row; each row's logits ``[R, V]``."""
        assert self._state is not None
        device = self.model.device
        lengths = torch.tensor([len(c) for c in contexts])
        kept: list[tuple[Tensor, Tensor]] = []
        layout = PackedLayout(lengths, device, keep=kept)
        ends = layout.offsets[1:] - 1
        logits = self.model(
            input_ids=torch.tensor([t for c in contexts for t in c], device=device)[None],
            position_ids=layout.position_ids,
            use_cache=False,
            logits_to_keep=ends.to(device),
            layout=layout,
        ).logits[0]
        first = len(self._running)
        copied = lengths[which]
        row = torch.repeat_interleave(torch.arange(first, first + len(which)), copied)
        position = torch.cat([torch.arange(n) for n in copied.tolist()])
        source = layout.offsets[which].repeat_interleave(copied) + position
        self._state.store(kept, source.to(device), row.to(device), position.to(device))
        return logits[which.to(device)]

    def _decode(self) -> None:
        """One forward pass for all running rows: their last token in, their next one out."""
        state, rows = self._state, len(self._running)
        assert state is not None
        logits_R1V = self.model(
            input_ids=state.last_R[:rows, None],
            position_ids=(state.length_R[:rows, None] - 1),
            use_cache=False,
            layout=_CacheLayout(state, rows),
        ).logits
        self._take_tokens(logits_R1V[:, 0], 0)

    def _take_tokens(self, logits_RV: Tensor, first: int) -> None:
        """Samples the next token of the rows from `first` on, and lets those leave that are done."""
        state, rows = self._state, slice(first, len(self._running))
        assert state is not None
        scaled_RV = logits_RV.float() / state.temperature_R[rows, None]
        noise_RV = gumbel(state.bits_R[rows], state.position_R[rows], scaled_RV.shape[1])
        score_RV = scaled_RV + noise_RV * state.noisy_R[rows, None]
        token_R = score_RV.argmax(-1)
        if self.count_near_ties:
            best = score_RV.topk(2).values
            self.near_ties += int((best[:, 0] - best[:, 1] <= NEAR_TIE).sum())
        logp_R = scaled_RV.gather(-1, token_R[:, None])[:, 0] - scaled_RV.logsumexp(-1)
        state.append(rows, token_R, logp_R)
        stopped_R = (token_R[:, None] == state.stops_RS[rows]).any(-1)
        done = (stopped_R | (state.position_R[rows] >= state.max_tokens_R[rows])).nonzero()[:, 0]
        if len(done):
            reasons = stopped_R[done].tolist()
            ended = [r + first for r in done.tolist()]
            jobs = [self._running[r] for r in ended]
            self._leave(ended)
            self._ready += [job.result("stop" if stop else "length") for job, stop in zip(jobs, reasons)]

    def _leave(self, rows: list[int]) -> None:
        """Takes rows out of the batch; rows from its end move into the gaps."""
        if not rows:
            return
        for r in rows:
            self._collect(self._running[r], r)
        remaining = len(self._running) - len(rows)
        gone = set(rows)
        gaps = [r for r in rows if r < remaining]
        movers = [r for r in range(remaining, len(self._running)) if r not in gone]
        assert self._state is not None
        if movers:
            self._state.move(movers, gaps)
        for source, target in zip(movers, gaps):
            self._running[target] = self._running[source]
        del self._running[remaining:]
        if not self._running and not self._waiting:
            self._state = None  # the cache's memory goes back to training

    def _collect(self, job: Job, row: int) -> None:
        """Reads a row's tokens out of the state into its job."""
        assert self._state is not None
        new = int(self._state.position_R[row]) - len(job.request.generated_ids)
        job.tokens += self._state.tokens_RW[row, len(job.tokens) : new].tolist()
        job.logps += self._state.logps_RW[row, len(job.logps) : new].tolist()

    def _reserve(self, rows: int, width: int) -> None:
        """Makes the state hold this many rows of this width, keeping what is running."""
        old = self._state
        if old is not None and rows <= old.rows and width <= old.width:
            return
        demand = len(self._waiting) + rows
        rows = max(rows, min(demand, self.max_cache_tokens // width))
        self._state = _State(self.model, rows, width, len(self._running), old)

    def _autocast(self) -> AbstractContextManager[None]:
        device = self.model.device.type
        return torch.autocast(device, dtype=torch.bfloat16) if device == "cuda" else nullcontext()


class _State:
    """Tensors of the running rows: the key-value cache and everything sampling needs, row by row.

    Args:
        model: gives sizes, precision and device.
        rows: rows to hold.
        width: tokens per row.
        keep: rows to take over from `old`.
        old: the state so far.
    """

    def __init__(self, model: PreTrainedModel, rows: int, width: int, keep: int, old: _State | None) -> None:
        config, device = model.config, model.device
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        dtype = torch.bfloat16 if device.type == "cuda" else model.dtype
        self.rows, self.width = rows, width
        # One tensor for all layers, keys and values: moving a row is one operation. [layers, 2, R, K, W, D]
        # Zeros: what is masked out still enters attention as 0 x value, and must not be a stray NaN.
        self.cache = torch.zeros(
            config.num_hidden_layers, 2, rows, config.num_key_value_heads, width, size, dtype=dtype, device=device
        )
        long = {"dtype": torch.int64, "device": device}
        self.last_R = torch.zeros(rows, **long)  # last token, not yet in the cache
        self.length_R = torch.zeros(rows, **long)  # tokens of the sequence, the last one included
        self.position_R = torch.zeros(rows, **long)  # tokens generated so far, by aborted requests too
        self.max_tokens_R = torch.zeros(rows, **long)
        self.bits_R = torch.zeros(rows, **long)
        self.stops_RS = torch.full((rows, 8), -1, **long)
        self.temperature_R = torch.ones(rows, device=device)
        self.noisy_R = torch.zeros(rows, device=device)
        self.tokens_RW = torch.zeros(rows, width, **long)
        self.logps_RW = torch.zeros(rows, width, device=device)
        self.base_R = torch.zeros(rows, **long)  # tokens generated by aborted requests
        self._by_row = [
            self.last_R, self.length_R, self.position_R, self.max_tokens_R, self.bits_R, self.stops_RS,
            self.temperature_R, self.noisy_R, self.base_R,
        ]  # fmt: skip
        if old is not None and keep:
            self.cache[:, :, :keep, :, : old.width] = old.cache[:, :, :keep]
            self.tokens_RW[:keep, : old.width] = old.tokens_RW[:keep]
            self.logps_RW[:keep, : old.width] = old.logps_RW[:keep]
            for new, before in zip(self._by_row, old._by_row):
                new[:keep] = before[:keep]

    def enter(self, jobs: list[Job], first: int) -> None:
        """Writes the jobs' values to the rows from `first` on."""
        rows = slice(first, first + len(jobs))
        requests = [job.request for job in jobs]
        for target, values in [
            (self.length_R, [len(job.context()) for job in jobs]),
            (self.position_R, [len(job.request.generated_ids) + len(job.tokens) for job in jobs]),
            (self.base_R, [len(r.generated_ids) for r in requests]),
            (self.max_tokens_R, [r.sampling.max_tokens for r in requests]),
            (self.bits_R, [r.noise.bits() for r in requests]),
        ]:
            target[rows] = torch.tensor(values, device=target.device)
        temperatures = [r.sampling.temperature for r in requests]
        device = self.temperature_R.device
        self.temperature_R[rows] = torch.tensor([t if t > 0 else 1.0 for t in temperatures], device=device)
        self.noisy_R[rows] = torch.tensor([float(t > 0) for t in temperatures], device=device)
        stops = [r.sampling.stop_token_ids for r in requests]
        assert max(map(len, stops)) <= self.stops_RS.shape[1], "more stop tokens than the engine has room for"
        padded = [list(s) + [-1] * (self.stops_RS.shape[1] - len(s)) for s in stops]
        self.stops_RS[rows] = torch.tensor(padded, device=device)

    def append(self, rows: slice, token_R: Tensor, logp_R: Tensor) -> None:
        """One more token for these rows."""
        new_R1 = (self.position_R[rows] - self.base_R[rows])[:, None]
        self.tokens_RW[rows].scatter_(1, new_R1, token_R[:, None])
        self.logps_RW[rows].scatter_(1, new_R1, logp_R[:, None])
        self.last_R[rows] = token_R
        self.length_R[rows] += 1
        self.position_R[rows] += 1

    def store(self, kept: list[tuple[Tensor, Tensor]], source: Tensor, row: Tensor, position: Tensor) -> None:
        """Copies prefilled keys and values, ``[T, K, D]`` per layer, to (row, position)."""
        for layer, (k_TKD, v_TKD) in enumerate(kept):
            self.cache[layer, 0][row, :, position] = k_TKD[source].to(self.cache.dtype)
            self.cache[layer, 1][row, :, position] = v_TKD[source].to(self.cache.dtype)

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Rows `sources` take the places `targets`."""
        source, target = (torch.tensor(x, device=self.cache.device) for x in (sources, targets))
        used = int(self.length_R[source].max())
        self.cache[:, :, target, :, :used] = self.cache[:, :, source, :, :used]
        self.tokens_RW[target] = self.tokens_RW[source]
        self.logps_RW[target] = self.logps_RW[source]
        for values in self._by_row:
            values[target] = values[source]


class _CacheLayout:
    """Attention of one new token per row over its cached ones (see `models.attention.Layout`)."""

    def __init__(self, state: _State, rows: int) -> None:
        self.cache, device = state.cache, state.cache.device
        heads, width = state.cache.shape[3:5]
        place_R = state.length_R[:rows] - 1
        self.used = int(state.length_R[:rows].max())
        cached_RL = torch.arange(self.used, device=device)[None] <= place_R[:, None]
        mask_RL = torch.zeros(cached_RL.shape, dtype=state.cache.dtype, device=device)
        self.mask_R11L = mask_RL.masked_fill_(~cached_RL, -torch.inf)[:, None, None]
        first_RK = torch.arange(rows * heads, device=device).view(rows, heads) * width
        self.entry = (first_RK + place_R[:, None]).flatten()  # where a layer's new keys go, among its R x K x W

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys, values = self.cache[layer, 0], self.cache[layer, 1]
        rows, heads, _, size = q.shape
        kv_heads, width = keys.shape[1:3]
        keys.view(-1, size).index_copy_(0, self.entry, k.reshape(-1, size).to(keys.dtype))
        values.view(-1, size).index_copy_(0, self.entry, v.reshape(-1, size).to(values.dtype))
        # Heads of a group stand as if they were query positions. Two products are quicker than SDPA at one position.
        both, group = rows * kv_heads, heads // kv_heads
        q_BGD = q.reshape(both, group, size).to(keys.dtype) * scale
        keys_BLD, values_BLD = (x[:rows].view(both, width, size)[:, : self.used] for x in (keys, values))
        score_BGL = torch.bmm(q_BGD, keys_BLD.transpose(1, 2))
        score_RKGL = score_BGL.view(rows, kv_heads, group, self.used) + self.mask_R11L
        weight_RKGL = score_RKGL.softmax(-1, dtype=torch.promote_types(score_RKGL.dtype, torch.float32))
        out = torch.bmm(weight_RKGL.to(values.dtype).view(both, group, self.used), values_BLD)
        return out.reshape(rows, 1, heads, size)
