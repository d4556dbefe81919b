"""Stateless noise: every random choice is a function of what it is for, never of batch, order or process.

The noise of a sampled token is a hash of (seed, stream, draw of the prompt, sample, position, token id). Two runs, or
two ways of batching one run, therefore see the same noise bits. Shapes: R rows, V vocabulary; B
sequences, T tokens of all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ID_STEP = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit integer (splitmix64)
_POSITION_STEP = -0x3C6EF372FE94F82B
_TINY = 2.0**-32
_BLOCK = 1 << 15  # entries


@dataclass(frozen=True, slots=True)
class NoiseKey:
    """The key of some noise: what it is for.

    Args:
        seed: the run's seed.
        stream: what is drawn: "train", "eval", "shuffle", ... Streams never share noise.
        draw: which draw of a prompt this is, counted over the whole run (an epoch later it is another draw).
        sample: which of the samples of that draw.
    """

    seed: int
    stream: str
    draw: int = 0
    sample: int = 0

    def bits(self) -> int:
        """Returns 64 bits of the key as a signed integer."""
        text = f"{self.seed}/{self.stream}/{self.draw}/{self.sample}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def fork_stream(stream: str, prompt_ids: Sequence[int], before: int) -> str:
    """Returns the stream of a forked sequence: a trajectory's first sequence has the plain stream.

    It depends on what the model is shown, and on how often it was shown that before: an agent that comes to the same
    context again draws anew, and n forks of one context give n different sequences.

    Args:
        stream: the trajectory's.
        prompt_ids: the ids that the sequence begins with.
        before: how many earlier sequences of the trajectory begin with the same ids.
    """
    digest = hashlib.blake2b(",".join(map(str, prompt_ids)).encode(), digest_size=8).hexdigest()
    return f"{stream}/fork/{digest}/{before}"


def _mix(x: Tensor) -> Tensor:
    """Applies the splitmix64 finaliser to int64 tensors, in place (products wrap; shifts are made logical by
    masking).
    """
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return x.bitwise_xor_((x >> 31).bitwise_and_(0x1FFFFFFFF))


def gumbel(bits_R: Tensor, position_R: Tensor, vocab: int) -> Tensor:
    """Computes Gumbel noise ``[R, V]`` (float32) for the tokens at these positions of these rows.

    argmax(logits / temperature + gumbel) is a sample of softmax(logits / temperature) (Gumbel-max trick).

    Args:
        bits_R: `NoiseKey.bits` of each row (int64).
        position_R: position of the token in its trajectory, counted from the first generated token (int64).
        vocab: V.
    """
    ids_V = torch.arange(vocab, device=bits_R.device) * _ID_STEP
    row_R = _mix(bits_R + position_R * _POSITION_STEP)
    out_RV = torch.empty(len(row_R), vocab, device=bits_R.device)
    # On a CPU a few rows at a time: data that fits into the processor's cache is six times as fast for large
    # vocabularies.
    size = len(row_R) if bits_R.is_cuda else max(1, _BLOCK // vocab)
    for some_R, part_RV in zip(row_R.split(size), out_RV.split(size)):
        hash_RV = _mix(some_R[:, None] + ids_V)
        part_RV.copy_(hash_RV.bitwise_right_shift_(32).bitwise_and_(0xFFFFFFFF))
        uniform_RV = part_RV.add_(0.5).mul_(_TINY).clamp_(max=1 - 2.0**-24)
        # log1p keeps full precision where it matters: small uniforms make the large values that win.
        uniform_RV.neg_().log1p_().neg_().log_().neg_()
    return out_RV


def moved(bits: int, by: int) -> int:
    """Returns bits, a signed int64, whose noise at position t + `by` is the noise that `bits` has at t (see
    `gumbel`).
    """
    return (bits - by * _POSITION_STEP + 2**63) % 2**64 - 2**63


def token_keys(bits_B: Tensor, lengths_B: Tensor) -> Tensor:
    """Computes a number for every token of B sequences ``[T]`` (int64), which depends on its sequence's key and its
    place alone.

    Args:
        bits_B: `NoiseKey.bits` of each sequence.
        lengths_B: its number of tokens.
    """
    start_B = lengths_B.cumsum(0) - lengths_B
    place_T = torch.arange(int(lengths_B.sum())) - start_B.repeat_interleave(lengths_B)
    return _mix(bits_B.repeat_interleave(lengths_B) + place_T * _POSITION_STEP)


def uniform(key: NoiseKey, *ids_R: Tensor) -> Tensor:
    """Computes uniform numbers in (0, 1) ``[R]`` (float64), each a function of the key and of its row's identity alone.

    Args:
        key: of the noise.
        ids_R: what tells rows apart, one or more columns of integers (int64).
    """
    hash_R = torch.full_like(ids_R[0], key.bits())
    for id_R in ids_R:
        hash_R = _mix(hash_R + id_R * _ID_STEP)
    return (((hash_R >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52  # 53 bits could round to 1


def permutation(key: NoiseKey, count: int) -> list[int]:
    """Returns a random order of ``range(count)`` that depends on the key alone."""
    hashes = _mix(torch.arange(count) * _ID_STEP + key.bits())
    return torch.argsort(hashes, stable=True).tolist()
