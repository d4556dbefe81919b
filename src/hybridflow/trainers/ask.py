"""Asking a model outside of training: `hybridflow eval` and `hybridflow generate`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from hybridflow.checkpoint.run_folder import make_folder
from hybridflow.config.locate import is_function_reference
from hybridflow.config.sections import EvalConfig
from hybridflow.data.chat import render_prompt, require_template
from hybridflow.data.prompts import load_prompts
from hybridflow.errors import UserError
from hybridflow.models.load import load_model, stop_ids
from hybridflow.noise import NoiseKey
from hybridflow.protocols import Request, Sampling, generate
from hybridflow.rewards.function import load_reward
from hybridflow.rollout.inline import InlineEngine
from hybridflow.tracking.rollouts import write_rollouts
from hybridflow.trainers.evaluate import evaluate
from hybridflow.trainers.lifecycle import pick_device

DEFAULT_TOKENS = 256  # longest answer of `hybridflow generate`, unless --max-tokens is given


def evaluate_model(config: EvalConfig) -> Iterator[str]:
    """Scores a model's greedy answers; writes evaluation.json and the answers into the run's folder.

    Raises:
        UserError: the model, the data or the reward is wrong.
    """
    if config.rollout.engine != "inline":
        raise UserError("hybridflow eval answers with the inline engine", fix="set rollout.engine=inline")
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    assert config.data.eval is not None
    folder = Path(config.run.folder)
    make_folder(folder)
    model, tokenizer = load_model(config.model.path, seed=config.run.seed)
    model.to(pick_device(config.run.device))
    prompts = load_prompts(config.data.eval, config.data, tokenizer, seed=config.run.seed)
    metrics, records = evaluate(
        InlineEngine(model, max_cache_tokens=config.rollout.max_cache_tokens),
        prompts,
        load_reward(config.reward.function),
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        sampling=Sampling(config.rollout.max_response_tokens, 0.0, stop_ids(model, tokenizer)),
        seed=config.run.seed,
        max_rows=config.eval.max_rows,
    )
    for record in records:
        record |= {"step": 0, "tokens": [str(tokenizer.decode([i])) for i in record["token_ids"]]}
    write_rollouts(folder / "answers.parquet", records)
    (folder / "evaluation.json").write_text(json.dumps({"model": config.model.path, "rows": len(records)} | metrics))
    for name, value in metrics.items():
        yield f"{name} = {value:.4f} over {len(records)} rows"
    yield f"answers: {folder / 'answers.parquet'}"


def ask(
    model_path: str, prompts: Sequence[str], *, max_tokens: int | None, temperature: float, samples: int, seed: int
) -> Iterator[str]:
    """Answers to prompts, as text, in their order.

    Raises:
        UserError: the model cannot be loaded, or a prompt is longer than its context.
    """
    for name, value, low in [
        ("--max-tokens", 1 if max_tokens is None else max_tokens, 1),
        ("--samples", samples, 1),
        ("--temperature", temperature, 0),
        ("--seed", seed, 0),
    ]:
        if not low <= value < math.inf:
            raise UserError(f"{name} is {value}, it must be at least {low}")
    if not is_function_reference(model_path) and (Path(model_path) / "model" / "config.json").is_file():
        model_path = str(Path(model_path) / "model")  # a run's folder
    model, tokenizer = load_model(model_path, seed=seed)
    require_template(tokenizer)
    model.to(pick_device("auto"))
    stops, context = stop_ids(model, tokenizer), getattr(model.config, "max_position_embeddings", None) or math.inf
    requests = []
    for i, prompt in enumerate(prompts):
        ids = tuple(render_prompt(tokenizer, prompt)[1])
        limit = int(min(DEFAULT_TOKENS, context - len(ids))) if max_tokens is None else max_tokens
        if len(ids) + limit > context or limit < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the model's context is {context}",
                why=f"{limit} more do not fit" if limit > 0 else "",
                fix="ask something shorter, or lower --max-tokens",
            )
        sampling = Sampling(limit, temperature, stops)
        requests += [Request(ids, sampling, NoiseKey(seed, "generate", i, sample)) for sample in range(samples)]
    results = generate(InlineEngine(model), requests)
    for i, result in enumerate(results):
        mark = "" if result.finish_reason == "stop" else f"  [cut at {len(result.token_ids)} tokens]"
        text = tokenizer.decode(result.token_ids, skip_special_tokens=True)
        yield f"{prompts[i // samples]}{text}{mark}" if len(results) > 1 else f"{text}{mark}"
