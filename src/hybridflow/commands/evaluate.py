"""Evaluates a model outside of training: `hybridflow eval`."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
import transformers

from hybridflow import __version__
from hybridflow.chat.special_tokens import answer_decoder
from hybridflow.checkpoint.run_folder import make_folder, write_atomically
from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.devices import pick_device
from hybridflow.evaluation.evaluate import Evaluation, evaluate, never_ended, sampling_for
from hybridflow.grading.make import check_rows, data_sources, failure_policy, make_grader
from hybridflow.groups.answering import Answering
from hybridflow.models.load import stop_ids
from hybridflow.models.lora import load_trainable
from hybridflow.placing.acting import make_rollouts, prompts_of
from hybridflow.placing.generation import inline_engine, training_sampling
from hybridflow.tracking.rollouts import EVALUATION, write_rollouts


def evaluate_model(config: EvalConfig, *, note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Scores a model's responses; writes evaluation.json and answers.parquet into the run's folder.

    An earlier evaluation with other settings or another result is kept: it moves to ``before-1/``, or the next free
    folder of that form.

    Args:
        config: the configuration.
        note: takes a line about the progress every 10 seconds.

    Returns:
        What evaluation.json holds.

    Raises:
        UserError: the model, the data or the reward is wrong.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    began, folder = time.perf_counter(), Path(config.run.folder)
    section = config.model
    model, tokenizer = load_trainable(section, seed=config.run.seed)
    model.to(pick_device(config.run.device))
    tasks = None if config.agent is None else config.agent.eval_tasks
    prompts = prompts_of(config, tokenizer, config.data.eval, tasks)
    assert prompts is not None, "the configuration was checked"
    check_rows(config, prompts)
    limit, stops = config.rollout.max_response_tokens, stop_ids(model, tokenizer)
    make_folder(folder)
    decode = answer_decoder(tokenizer, stops, keep=config.reward.keep_special_tokens)
    engine = inline_engine(model, tokenizer, config.rollout, keep_turns=config.agent is not None)
    making = make_rollouts(config, tokenizer, engine, stops, prompts, tell=note or (lambda text: None))
    with closing(making) as rollouts, closing(make_grader(config, None, data_sources(prompts))) as grader:
        done = evaluate(
            Answering(
                engine,
                rollouts,
                grader,
                decode,
                failure_policy(config.reward),
                "fail" if config.agent is None else config.agent.on_failure,
            ),
            prompts,
            config.eval,
            sampling=sampling_for(config.eval, training_sampling(config.rollout, stops)),
            seed=config.run.seed,
            note=note,
        )
    for record in done.records:
        record |= {"step": 0, "tokens": [str(tokenizer.decode([i])) for i in record["token_ids"]]}
    ends = [r["finish_reason"] for r in done.records if not r["sequence"]]  # of each response once
    advice = never_ended(ends, limit, repr(tokenizer.eos_token))
    result = _result(config, done, time.perf_counter() - began) | {"advice": [advice] if advice else []}
    kept = _keep_earlier(folder, result)
    if kept is not None and note is not None:
        note(f"the evaluation that was in {folder} is in {kept} now; to compare: hybridflow eval {kept} {folder}")
    write_rollouts(folder / "answers.parquet", done.records, EVALUATION)
    write_atomically(folder / "evaluation.json", json.dumps(result, indent=1) + "\n")
    return result


def _keep_earlier(folder: Path, result: Mapping[str, Any]) -> Path | None:
    """Moves the evaluation in a folder aside, unless it is the same as this one; returns its new place."""
    file = folder / "evaluation.json"
    if not file.is_file():
        return None
    with suppress(ValueError, AttributeError):  # any other file is kept
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
    """Yields an evaluation as lines for a reader, from the content of evaluation.json."""
    for name, m in result["intervals"].items():
        interval = f"95 % interval {m['low']:.4f} to {m['high']:.4f} ({m['method']})"
        yield f"{name} = {m['value']:.4f}, {interval}, {m['prompts']} prompts"
    for advice in result["advice"]:
        yield f"advice: {advice}"
    yield f"responses: {Path(result['settings']['run']['folder']) / 'answers.parquet'}"
