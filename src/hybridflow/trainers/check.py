"""Everything that can fail before training, tried before training: `hybridflow check`, and the start of every run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.config.sections import EvalConfig, RlConfig, SftConfig
from hybridflow.data.prompts import PromptSet, load_prompts
from hybridflow.data.sft import load_sft
from hybridflow.errors import UserError
from hybridflow.models.load import load_tokenizer
from hybridflow.rewards.function import load_reward

MAX_ROWS = 20_000  # prompts looked at; later ones are checked when they are drawn
MAX_CONVERSATIONS = 2_000  # whole conversations take longer


def check(config: RlConfig | SftConfig | EvalConfig) -> Iterator[str]:
    """Checks one thing after the other, and says in words what it found.

    Raises:
        UserError: the first thing that is wrong.
    """
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device is cuda, but torch finds no GPU", fix="set run.device=cpu or install a CUDA torch")
    if config.run.resume == "never" and (Path(config.run.folder) / "metrics.jsonl").exists():
        raise UserError(
            f"{config.run.folder} already holds a run, and run.resume is never",
            fix="choose another run.folder, delete this one, or set run.resume=auto to go on",
        )
    tokenizer = load_tokenizer(config.model.path, seed=config.run.seed)
    yield f"model {config.model.path}: tokenizer with {len(tokenizer)} tokens, answers end with {tokenizer.eos_token!r}"
    if isinstance(config, SftConfig):
        yield from _check_sft(config, tokenizer)
        return
    if config.rollout.engine == "vllm":
        from hybridflow.rollout.vllm import require_vllm

        yield require_vllm()
    if isinstance(config, RlConfig):
        assert config.data.train is not None
        yield from _check_prompts(config, config.data.train, tokenizer, "training")
    if config.data.eval is not None:
        yield from _check_prompts(config, config.data.eval, tokenizer, "evaluation")
    if isinstance(config, RlConfig):
        yield arithmetic(config)


def arithmetic(config: RlConfig) -> str:
    """What a step of this run is, in words and numbers."""
    t, d, r = config.train, config.data, config.rollout
    answers = t.prompts_per_step * t.samples_per_prompt
    size = t.sequences_per_update or answers
    updates = t.epochs_per_step * (answers // size)
    longest = d.max_prompt_tokens + r.max_response_tokens
    return (
        f"a step draws {t.prompts_per_step} prompts and generates {t.samples_per_prompt} answers to each: {answers} "
        f"answers of at most {r.max_response_tokens} tokens; it makes {updates} optimizer step{'s' * (updates > 1)} on "
        f"{size} answers each, in micro-batches of at most {t.tokens_per_microbatch} tokens (the longest possible "
        f"sequence has {longest}). {t.steps} steps: {t.steps * t.prompts_per_step} prompts, "
        f"{t.steps * answers} answers, {t.steps * updates} optimizer steps."
    )


def _check_prompts(
    config: RlConfig | EvalConfig, source: str, tokenizer: PreTrainedTokenizerBase, purpose: str
) -> Iterator[str]:
    prompts = load_prompts(source, config.data, tokenizer, seed=config.run.seed)
    longest = max(len(prompts[i].token_ids) for i in range(min(len(prompts), MAX_ROWS)))
    unseen = f" (the first {MAX_ROWS} were read)" if len(prompts) > MAX_ROWS else ""
    yield f"{purpose} data {source}: {len(prompts)} rows{unseen}, longest prompt {longest} tokens"
    yield f"  first prompt, token by token: {show_tokens(tokenizer, prompts[0].token_ids)}"
    yield _try_reward(config, prompts)


def _try_reward(config: RlConfig | EvalConfig, prompts: PromptSet) -> str:
    reward, prompt = load_reward(config.reward.function), prompts[0]
    answer = str(prompt.ground_truth)
    value = reward([answer], ground_truth=prompt.ground_truth, prompt=prompt.messages, row=prompt.row)[0]
    return f"  reward {reward.name}: the first row's ground truth {answer[:60]!r} given as the answer scores {value:g}"


def _check_sft(config: SftConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    data, t = load_sft(config.data, tokenizer, seed=config.run.seed), config.train
    batch = data.batch(list(range(min(len(data), MAX_CONVERSATIONS))))
    unseen = f" (the first {MAX_CONVERSATIONS} were read)" if len(data) > MAX_CONVERSATIONS else ""
    yield f"data {data.source}: {len(data)} conversations{unseen}, longest {int(batch.lengths().max())} tokens"
    learned = [int(i) for i, m in zip(batch.rows("input_ids_T")[0], batch.rows("loss_mask_T")[0]) if m]
    yield f"  first conversation, token by token: {show_tokens(tokenizer, batch.rows('input_ids_T')[0].tolist())}"
    yield f"  of these the loss is on: {show_tokens(tokenizer, learned)}"
    epochs = t.steps * t.sequences_per_update / len(data)
    yield (
        f"{t.steps} optimizer steps on {t.sequences_per_update} conversations each: {epochs:.2g} passes over the data"
        + (f", ending early below a loss of {t.stop_below_loss:g}" if t.stop_below_loss else "")
    )


def show_tokens(tokenizer: PreTrainedTokenizerBase, token_ids: list[int] | tuple[int, ...], limit: int = 80) -> str:
    """Token texts, one by one between bars, at most `limit` of them."""
    shown = "|".join(str(tokenizer.decode([i])).replace("\n", "\\n") for i in token_ids[:limit])
    return f"{shown}| ... {len(token_ids) - limit} more" if len(token_ids) > limit else shown
