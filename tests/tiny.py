"""Small models and batches for tests."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hybridflow.algorithms.aggregation import token_weights
from hybridflow.batch import Batch
from hybridflow.config.locate import load_function
from hybridflow.config.sections.data import SftDataSection
from hybridflow.config.sections.optim import OptimSection
from hybridflow.data.sft import load_sft
from hybridflow.engines.local import LocalEngine
from hybridflow.models.attention import ATTENTION
from hybridflow.models.load import load_model
from hybridflow.protocols.generation import Span
from hybridflow.protocols.groups import Group, TokenSequence, Trajectory, Turn
from hybridflow.protocols.training import Loss

CARRY = Path(__file__).resolve().parents[1] / "recipes/carry/task.py"
VOCAB = 37
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES,
            head_dim=8,
            sliding_window=8,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        )
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=16, num_experts=6, num_experts_per_tok=2)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES | {"num_key_value_heads": 4},
            moe_intermediate_size=16,
            n_routed_experts=8,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=3,
            first_k_dense_replace=1,
            q_lora_rank=12,
            kv_lora_rank=10,
            qk_rope_head_dim=4,
            qk_nope_head_dim=6,
            v_head_dim=8,
        )
    ),
}
SINGLE = ("Norm", "Router", "RotaryEmbedding")  # modules of Hugging Face's that compute in float32 by themselves
HEADS = {  # of query and key-value heads
    "one_kv_head": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 1})),
    "six_of_twelve_heads": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES | {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 6})
    ),
}


def plain_model(kind: str = "qwen3", seed: int = 0) -> PreTrainedModel:
    """A model of about 20 thousand parameters with Hugging Face's own attention; norms and biases are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (KINDS | HEADS)[kind]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def packed_model(kind: str = "qwen3", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same model with ragged attention; in float64 every operation on activations is in float64."""
    model = plain_model(kind, seed).to(dtype)
    model.set_attn_implementation(ATTENTION)
    return in_double(model) if dtype == torch.float64 else model


def in_double(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, and every operation on its activations too."""
    if any("experts" in name for name, _ in model.named_parameters()):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    for module in model.modules():
        if type(module).__name__.endswith(SINGLE):
            module.__class__ = _doubled(type(module))
    return model.double()


class Double(TorchFunctionMode):
    """Where a module asks for float32, whatever it is given, it gets float64.

    Norms, routers and rotary embeddings do. What float32 rounds away depends on the shapes that a processor multiplies
    and on its instructions; a router's rounding can even choose another expert. Float64 has none of that at 1e-10.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{name: wide(x) for name, x in (kwargs or {}).items()})


@functools.cache
def _doubled(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The same kind of module, whose forward pass gets float64 where it asks for float32."""

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with Double():
            return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward})


def ragged_batch(lengths: Sequence[int] = (7, 3, 12, 5, 9, 4), seed: int = 0) -> Batch:
    """Random sequences; the first token of each is masked out, and so are some others."""
    rng = torch.Generator().manual_seed(seed)
    mask = [torch.rand(n, generator=rng) < 0.7 for n in lengths]
    for part in mask:
        part[:1] = False
        part[-1:] = len(part) > 1
    ids = [torch.randint(VOCAB, (n,), generator=rng) for n in lengths]
    return Batch.from_rows({"input_ids_T": ids, "loss_mask_T": mask, "trajectory_B": list(range(len(lengths)))})


def group_batch(prompts: Sequence[int] = (6, 9, 1), answers: int = 4, seed: int = 0) -> Batch:
    """Groups of answers to random prompts of these lengths; two answers of each group carry no loss at all."""
    rng = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Any]] = {"input_ids_T": [], "loss_mask_T": [], "group_B": []}
    for group, length in enumerate(prompts):
        prompt = torch.randint(VOCAB, (length,), generator=rng)
        for answer in range(answers):
            size = 8 if answer in (1, 2) else int(torch.randint(1, 15, (1,), generator=rng))
            rows["input_ids_T"].append(torch.cat([prompt, torch.randint(VOCAB, (size,), generator=rng)]))
            scored = torch.full((size,), answer not in (1, 2))
            rows["loss_mask_T"].append(torch.cat([torch.zeros(length, dtype=torch.bool), scored]))
            rows["group_B"].append(100 - group)
    return Batch.from_rows({**rows, "trajectory_B": list(range(len(prompts) * answers))})


def trajectory_groups(groups: int = 2, samples: int = 4, seed: int = 0) -> list[Group]:
    """Groups of trajectories of 1 to 4 sequences, of 1 to 3 turns each, with observed tokens between the turns.

    A later sequence begins with the prompt and what the model sampled first, as where history was rewritten; or in one
    of two states of the group, equally long, as where each step is a sequence. The first turn from a state has it as
    its anchor and a reward, which lies on its last token.
    """
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(count)]

    made = []
    for draw in range(groups):
        prompt, states = ids(5), [ids(9), ids(9)]
        made.append(Group(draw + 30, draw, prompt, []))
        for sample in range(samples):
            sequences: list[TokenSequence] = []
            for number in range(1 + (sample + draw) % 4):
                state = rng.randrange(2)
                turns: list[Turn] = []
                tokens: list[int] = []
                for _ in range(rng.randint(1, 3)):
                    start = len(tokens)
                    tokens = tokens + ids(rng.randint(1, 4))
                    turns.append(Turn(start, len(tokens), "stop"))
                    tokens = tokens + ids(rng.randrange(3))  # observed
                rewritten = number == 1 and sample % 2
                shown = prompt + sequences[0].token_ids[:2] if rewritten else states[state] if number else prompt
                s = TokenSequence(shown, tokens, [0.0] * len(tokens), [], turns, fork="step" if number else "")
                for turn in turns:
                    turn.anchor = 7 if rewritten or not number else state
                    s.spans.append(Span(0, turn.start, turn.end))
                    for t in range(turn.start, turn.end):
                        s.logps[t] = -rng.uniform(0.5, 3)
                if number and not rewritten:
                    turns[0].reward = rng.uniform(-1, 1)
                    s.step_rewards = [(turns[0].end - 1, turns[0].reward)]
                sequences.append(s)
            made[-1].trajectories.append(Trajectory(sample, sequences, "done", f"{sample}", rng.uniform(-1, 1)))
    return made


def weights_of(batch: Batch, mode: str) -> Tensor:
    """The weight of every token; where the batch has no groups, pairs of sequences are some for the weights alone."""
    grouped = batch.select(list(batch))
    if "group_B" not in grouped:
        grouped["group_B"] = grouped["trajectory_B"] // 2
    return token_weights(grouped, mode, norm=16)


def with_policy_columns(batch: Batch, logp_T: Tensor, mode: str = "token-mean", seed: int = 1) -> Batch:
    """The batch with what the policy loss reads: off-policy old log-probs, advantages, weights."""
    rng = torch.Generator().manual_seed(seed)
    noise_T = torch.randn(batch.total(), generator=rng, dtype=logp_T.dtype)
    advantage_B = torch.randn(len(batch), generator=rng, dtype=logp_T.dtype)
    batch = batch.select(list(batch))
    batch["old_logp_T"] = logp_T + 0.3 * noise_T
    batch["rollout_logp_T"] = logp_T - 0.1 * noise_T
    batch["advantage_T"] = advantage_B[batch.sequence_of()] * batch["loss_mask_T"]
    batch["policy_weight_T"] = weights_of(batch, mode)
    batch["entropy_weight_T"] = token_weights(batch, "token-mean", norm=16)
    return batch


@functools.cache
def sft_losses_and_model(steps: int = 60) -> tuple[list[float], PreTrainedModel]:
    """A short supervised warm-up on the carry task: the loss of every step, and the model."""
    model, tokenizer = load_model(f"{CARRY}:tiny_qwen3", seed=0)
    with tempfile.TemporaryDirectory() as folder:  # no more of the recipe's 32,000 rows than are learned from
        rows = load_function(f"{CARRY}:demonstrations")(seed=0, count=16 * steps)
        path = Path(folder) / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        data = load_sft(SftDataSection(train=str(path), max_tokens=64), tokenizer, seed=0)
    optim = OptimSection(lr=5e-3, betas=(0.9, 0.95), schedule="linear", warmup_steps=10)
    engine = LocalEngine(model, optim, total_steps=steps, tokens_per_microbatch=4096)
    losses = []
    for step in range(steps):
        batch = data.batch(list(range(16 * step, 16 * (step + 1))))
        batch["policy_weight_T"] = token_weights(batch, "token-mean", norm=1)
        losses.append(engine.update(batch, Loss("cross_entropy")).metrics["actor/loss"])
    return losses, model


def sft_model() -> PreTrainedModel:
    """The model of the warm-up."""
    return sft_losses_and_model()[1]
