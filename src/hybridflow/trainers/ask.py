"""Asking a model outside of training: `hybridflow eval` and `hybridflow generate`."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import transformers

from hybridflow import __version__
from hybridflow.checkpoint.run_folder import make_folder, write_atomically
from hybridflow.config.sections import EvalConfig, ModelSection
from hybridflow.data.chat import render_prompt
from hybridflow.data.messages import RefusedValue
from hybridflow.data.prompts import load_prompts
from hybridflow.data.reader import ConversationReader
from hybridflow.devices import pick_device
from hybridflow.errors import UserError
from hybridflow.models.load import context_of, stop_ids
from hybridflow.models.lora import load_trainable
from hybridflow.noise import NoiseKey
from hybridflow.protocols import Request, Result, RolloutEngine, Sampling
from hybridflow.rollout.groups import require_finite
from hybridflow.tracking.rollouts import EVALUATION, write_rollouts
from hybridflow.trainers.evaluate import Evaluation, evaluate, never_ended, sampling_for
from hybridflow.trainers.generation import inline_engine, training_sampling
from hybridflow.trainers.rewarding import check_rows, data_sources, failure_policy, make_grader
from hybridflow.trainers.special import answer_decoder

DEFAULT_TOKENS = 256  # longest answer of `hybridflow generate`, unless --max-tokens is given


def evaluate_model(config: EvalConfig, *, note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Scores a model's answers; writes evaluation.json and answers.parquet into the run's folder.

    An evaluation of other settings or another result that is there already is kept: it moves to ``before-1/``, or the
    next such folder that is free.

    Args:
        config: the configuration.
        note: takes a line about the progress now and then.

    Returns:
        What evaluation.json holds.

    Raises:
        UserError: the model, the data or the reward is wrong.
    """
    require_inline(config)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    assert config.data.eval is not None
    began, folder = time.perf_counter(), Path(config.run.folder)
    section = config.model
    model, tokenizer = load_trainable(section, seed=config.run.seed)
    model.to(pick_device(config.run.device))
    prompts = load_prompts(config.data.eval, config.data, tokenizer, seed=config.run.seed)
    check_rows(config, prompts)
    limit, stops = config.rollout.max_response_tokens, stop_ids(model, tokenizer)
    make_folder(folder)
    with closing(make_grader(config, None, data_sources(prompts))) as grader:
        done = evaluate(
            inline_engine(model, tokenizer, config.rollout),
            prompts,
            grader,
            failure_policy(config.reward),
            config.eval,
            decode=answer_decoder(tokenizer, stops, keep=config.reward.keep_special_tokens),
            sampling=sampling_for(config.eval, training_sampling(config.rollout, stops)),
            seed=config.run.seed,
            note=note,
        )
    for record in done.records:
        record |= {"step": 0, "tokens": [str(tokenizer.decode([i])) for i in record["token_ids"]]}
    advice = never_ended([r["finish_reason"] for r in done.records], limit, repr(tokenizer.eos_token))
    result = _result(config, done, time.perf_counter() - began) | {"advice": [advice] if advice else []}
    kept = _keep_earlier(folder, result)
    if kept is not None and note is not None:
        note(f"the evaluation that was in {folder} is in {kept} now; to compare: hybridflow eval {kept} {folder}")
    write_rollouts(folder / "answers.parquet", done.records, EVALUATION)
    write_atomically(folder / "evaluation.json", json.dumps(result, indent=1) + "\n")
    return result


def require_inline(config: EvalConfig) -> None:
    """Raises a UserError where an evaluation asks for another engine."""
    if config.rollout.engine != "inline":
        raise UserError("hybridflow eval answers with the inline engine", fix="set rollout.engine=inline")


def _keep_earlier(folder: Path, result: Mapping[str, Any]) -> Path | None:
    """Moves the evaluation in a folder aside, unless it is the same as this one; where it is then."""
    file = folder / "evaluation.json"
    if not file.is_file():
        return None
    with suppress(ValueError, AttributeError):  # whatever else it is, it is kept
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if all(earlier.get(name) == json.loads(json.dumps(result[name])) for name in ("settings", "metrics")):
            return None
    kept = next(f for f in (folder / f"before-{i}" for i in count(1)) if not f.exists())
    kept.mkdir()
    for name in ("answers.parquet", "evaluation.json"):
        with suppress(FileNotFoundError):
            (folder / name).rename(kept / name)
    return kept


def _result(config: EvalConfig, done: Evaluation, seconds: float) -> dict[str, Any]:
    return {
        "model": config.model.path,
        "prompts": done.prompts,
        "samples_per_prompt": config.eval.samples_per_prompt,
        "metrics": done.metrics(),
        "intervals": {
            m.key: {"value": m.value, "low": m.low, "high": m.high, "method": m.method, "prompts": m.prompts}
            for m in done.measures
        },
        "seconds": round(seconds, 3),
        "settings": config.model_dump(mode="json"),
        "versions": {
            "hybridflow": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def evaluation_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """An evaluation in words, from what evaluation.json holds."""
    for name, m in result["intervals"].items():
        interval = f"95 % interval {m['low']:.4f} to {m['high']:.4f} ({m['method']})"
        yield f"{name} = {m['value']:.4f}, {interval}, {m['prompts']} prompts"
    for advice in result["advice"]:
        yield f"advice: {advice}"
    yield f"answers: {Path(result['settings']['run']['folder']) / 'answers.parquet'}"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of `hybridflow generate`.

    Args:
        prompt: what was asked.
        sample: which of the answers to it.
        response: the text, without special tokens.
        finish_reason: "stop", or "length" where it was cut.
        tokens: its length.
    """

    prompt: str
    sample: int
    response: str
    finish_reason: str
    tokens: int

    def line(self) -> str:
        """The text, with a mark where it was cut."""
        return self.response + ("" if self.finish_reason == "stop" else f"  [cut at {self.tokens} tokens]")


def ask(
    model_path: str,
    prompts: Sequence[str],
    *,
    max_tokens: int | None,
    sampling: Sampling,
    samples: int,
    seed: int,
    packing: bool = True,
    trust_remote_code: bool = False,
) -> Iterator[Answer]:
    """Answers to prompts, in their order.

    Args:
        model_path: the model, or a run's folder.
        prompts: what to ask.
        max_tokens: longest answer; None is `DEFAULT_TOKENS`, or less in a short context.
        sampling: how to draw; its `max_tokens` and stop tokens are filled in.
        samples: answers to each prompt.
        seed: of the noise.
        packing: see ``model.packing``.
        trust_remote_code: see ``model.trust_remote_code``.

    Raises:
        UserError: the model cannot be loaded, a prompt cannot be rendered or is longer than its context, or the model's
            numbers are not finite.
    """
    for name, value, low in [
        ("--max-tokens", 1 if max_tokens is None else max_tokens, 1),
        ("--samples", samples, 1),
        ("--temperature", sampling.temperature, 0),
        ("--seed", seed, 0),
    ]:
        if not low <= value < math.inf:
            raise UserError(f"{name} is {value}, it must be at least {low}")
    section = ModelSection(path=model_path, packing=packing, trust_remote_code=trust_remote_code)
    model, tokenizer = load_trainable(section, seed=seed)
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {model_path} has no chat template",
            why="`generate` asks as a user does in a chat, and the template says how",
            fix="score a model that continues plain text with `hybridflow eval` and data.format=text, or set "
            "chat_template in its tokenizer_config.json",
        )
    model.to(pick_device())
    stops, context = stop_ids(model, tokenizer), context_of(model) or math.inf
    reader, requests = ConversationReader(tokenizer), []
    for i, prompt in enumerate(prompts):
        try:
            ids = tuple(render_prompt(tokenizer, reader.prompt(prompt))[1])
        except RefusedValue as refused:
            raise UserError(f"prompt {i + 1} {refused}", why=refused.why, fix=refused.fix) from None
        limit = int(min(DEFAULT_TOKENS, context - len(ids))) if max_tokens is None else max_tokens
        if len(ids) + limit > context or limit < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the model's context is {context}",
                why=f"{limit} more do not fit" if limit > 0 else "",
                fix="ask something shorter, or lower --max-tokens",
            )
        asked = replace(sampling, max_tokens=limit, stop_token_ids=stops)
        requests += [Request(ids, asked, NoiseKey(seed, "generate", i, sample)) for sample in range(samples)]
    for i, result in enumerate(_in_order(inline_engine(model, tokenizer, stop=sampling.stop), requests)):
        require_finite([result], f"prompt {i // samples + 1}", "--temperature")
        text = str(tokenizer.decode(result.token_ids, skip_special_tokens=True))
        yield Answer(prompts[i // samples], i % samples, text, result.finish_reason, len(result.token_ids))


def _in_order(engine: RolloutEngine, requests: Sequence[Request]) -> Iterator[Result]:
    """The results in the order of their requests, each as soon as those before it are there."""
    done: dict[int, Result] = {}
    for handle in [engine.submit(request) for request in requests]:
        while handle not in done:
            done.update({result.handle: result for result in engine.wait()})
        yield done.pop(handle)
