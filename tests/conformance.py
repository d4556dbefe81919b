"""What the conformance suite asks with: engines and tiny models by name, requests, the log-probs they should have."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hybridflow.config.locate import load_function
from hybridflow.models.attention import ATTENTION
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Result, RolloutEngine, Sampling
from hybridflow.protocols.weights import WeightStream
from hybridflow.rollout.startup import EngineModel
from hybridflow.weights.stream import stream_of, verify

CARRY = Path(__file__).resolve().parents[1] / "recipes/carry/task.py"
VOCAB, CONTEXT = 100, 512
TOLERANCE = 1e-4
FAR = 0.05  # other weights or another temperature are further away than this

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "eos_token_id": 1, "pad_token_id": 0,
    "bos_token_id": None,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2_tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=32, tie_word_embeddings=False)
    ),
}


def model_of(kind: str) -> PreTrainedModel:
    """A random model with Hugging Face's own attention; its predictions have about 3 of 4.6 nats."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = MODELS[kind]().eval()
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.model.norm.weight.mul_(1.7)  # nearly uniform predictions would hide a wrong temperature
    return model


def tokenizer() -> Any:
    """Of 100 tokens: a token is a character."""
    return load_function(f"{CARRY}:make_tokenizer")()


def decode(token_ids: list[int]) -> str:
    """Token ids as text."""
    return str(tokenizer().decode(token_ids, skip_special_tokens=True))


@dataclass
class Setup:
    """An engine, and the model whose weights it holds."""

    engine: RolloutEngine
    model: PreTrainedModel
    name: str
    version: int = 0

    def perturb(self, seed: int, scale: float = 0.02) -> PreTrainedModel:
        """Changes every tensor of the model; returns a copy of what it was."""
        before = deepcopy(self.model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.model.parameters():
                weight += scale * torch.randn(weight.shape, generator=generator)
        return before

    def publish(self, stream: WeightStream | None = None) -> None:
        """Gives the engine the model's weights, as a trainer does."""
        self.version += 1
        stream = stream or stream_of(self.model)
        verify(stream, self.engine.update_weights(stream, self.version), self.version)


# --- engines ---


def start(name: str, kind: str, folder: Path) -> Setup:
    """An engine by its name on a model by its name; the model is written to the folder, for engines that read it."""
    model = model_of(kind)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Setup(STARTS[name](model, folder), model, name)


def _inline(keep_turns: bool) -> Callable[[PreTrainedModel, Path], RolloutEngine]:
    def begin(model: PreTrainedModel, folder: Path) -> RolloutEngine:
        from hybridflow.rollout.inline.engine import InlineEngine

        replica = deepcopy(model)
        replica.set_attn_implementation(ATTENTION)
        return InlineEngine(replica, decode=decode, keep_turns=keep_turns)

    return begin


def _vllm(tensor_parallel: int = 1, **more: Any) -> Callable[[PreTrainedModel, Path], RolloutEngine]:
    def begin(model: PreTrainedModel, folder: Path) -> RolloutEngine:
        from hybridflow.rollout.vllm.engine import VllmEngine

        # Few tokens per step, so that not all requests fit into one.
        few = {"max_num_batched_tokens": CONTEXT}
        served = EngineModel(folder, CONTEXT, tensor_parallel, engine_args=few)
        return VllmEngine(served, decode=decode, **more)

    return begin


def _vllm_server(model: PreTrainedModel, folder: Path) -> RolloutEngine:
    from hybridflow.rollout.vllm.server import VllmServerEngine

    return VllmServerEngine(EngineModel(folder, CONTEXT), decode=decode)


def _sglang(model: PreTrainedModel, folder: Path) -> RolloutEngine:
    from hybridflow.rollout.sglang.engine import SglangEngine

    return SglangEngine(EngineModel(folder, CONTEXT), decode=decode)


def _sglang_server(model: PreTrainedModel, folder: Path) -> RolloutEngine:
    from hybridflow.rollout.sglang.server import SglangServerEngine

    return SglangServerEngine(EngineModel(folder, CONTEXT), decode=decode)


STARTS: dict[str, Callable[[PreTrainedModel, Path], RolloutEngine]] = {
    "inline": _inline(keep_turns=False),
    "inline_turns": _inline(keep_turns=True),
    "vllm": _vllm(),
    "vllm_workers": _vllm(mode="workers", tensor_parallel=2),
    "vllm_server": _vllm_server,
    "sglang": _sglang,
    "sglang_server": _sglang_server,
}


# --- requests, and what they should give ---


def requests(count: int, temperature: float = 1.0, *, seed: int = 0, max_tokens: int = 16) -> list[Request]:
    """Random prompts of 3 to 100 tokens."""
    rng = random.Random(seed)
    return [
        Request(
            tuple(rng.randrange(4, VOCAB) for _ in range(rng.randint(3, 100))),
            Sampling(max_tokens, temperature),
            NoiseKey(seed, "train", draw),
        )
        for draw in range(count)
    ]


@torch.no_grad()
def scores_of(model: PreTrainedModel, request: Request, result: Result) -> Tensor:
    """Logits that the result's tokens were drawn from ``[T, V]``, by one forward pass over the whole sequence."""
    ids = torch.tensor([*request.prompt_ids, *request.generated_ids, *result.token_ids])
    logits = model(ids[None], use_cache=False).logits[0].float() / (request.sampling.temperature or 1.0)
    return logits[len(ids) - len(result.token_ids) - 1 : -1]


def expected(model: PreTrainedModel, request: Request, result: Result) -> Tensor:
    """Log-probs of the result's tokens by a forward pass over the whole sequence."""
    logp_TV = scores_of(model, request, result).log_softmax(-1)
    return logp_TV.gather(-1, torch.tensor(result.token_ids)[:, None])[:, 0]


def gap(model: PreTrainedModel, asked: Sequence[Request], results: Sequence[Result]) -> float:
    """Largest difference between the engine's log-probs and the model's."""
    for result in results:
        assert len(result.logps) == len(result.token_ids) > 0
    return max(
        (torch.tensor(result.logps) - expected(model, request, result)).abs().max().item()
        for request, result in zip(asked, results, strict=True)
    )
