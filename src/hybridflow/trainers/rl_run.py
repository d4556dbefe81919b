"""Putting a reinforcement-learning run together: model, engines, data, records, and where to go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.batch import Batch
from hybridflow.checkpoint.journal import Journal
from hybridflow.checkpoint.run_folder import RunFolder
from hybridflow.checkpoint.store import read_checkpoint, save_checkpoint, saved_steps, step_folder
from hybridflow.checkpoint.weights import export_model, read_weights, write_weights
from hybridflow.config.sections import RlConfig
from hybridflow.data.prompts import PromptSet, load_prompts
from hybridflow.data.sampler import Sampler
from hybridflow.engines.local import LocalEngine
from hybridflow.errors import UserError
from hybridflow.models.load import load_model, stop_ids
from hybridflow.models.lora import add_lora
from hybridflow.protocols import RolloutEngine, Sampling, TrainEngine, Update
from hybridflow.rewards.function import RewardFunction, load_reward
from hybridflow.rollout.groups import GroupSource
from hybridflow.rollout.inline import InlineEngine
from hybridflow.tracking.events import EventLog
from hybridflow.tracking.trackers import Trackers
from hybridflow.trainers.lifecycle import Clock, StopRequest, pick_device
from hybridflow.weights.stream import verify

NONFINITE_LIMIT = 3  # updates in a row


@dataclass(slots=True)
class RlRun:
    """Everything that the loop in `trainers.rl` works with; use it as a context.

    `step` is the last step that is done. `steps()` gives those to do, and ends early when the run is asked to stop.
    """

    config: RlConfig
    folder: RunFolder
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: TrainEngine
    rollout: RolloutEngine
    source: GroupSource
    reward: RewardFunction
    prompts: PromptSet
    eval_prompts: PromptSet | None
    sampler: Sampler
    journal: Journal
    trackers: Trackers
    events: EventLog
    stop: StopRequest
    clock: Clock = field(default_factory=Clock)
    step: int = 0
    saved_step: int = 0
    nonfinite_in_a_row: int = 0
    token_text: dict[int, str] = field(default_factory=dict)

    def __enter__(self) -> RlRun:
        self.stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.__exit__(kind, error, trace)
        if error is not None:
            self.events.append("failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        self.rollout.close()
        self.trackers.close(failed=error is not None)
        self.folder.close()

    def steps(self) -> Iterator[int]:
        """The steps still to do; each counts as done once the loop asks for the next."""
        while self.step < self.config.train.steps and not self.stop.requested():
            yield self.step + 1
            self.step += 1

    def decode(self, token_ids: list[int]) -> str:
        """Tokens as text, without special tokens."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def texts_of(self, token_ids: list[int]) -> list[str]:
        """The text of every single token, special ones included."""
        for i in token_ids:
            if i not in self.token_text:
                self.token_text[i] = str(self.tokenizer.decode([i]))
        return [self.token_text[i] for i in token_ids]

    def publish(self, version: int) -> None:
        """Sends the trainer's weights to the generation engine and holds its receipt against what was sent.

        Raises:
            WeightSyncError: the engine has other weights.
        """
        stream = self.engine.stream_weights()
        verify(stream, self.rollout.update_weights(stream, version), version)

    def note_update(self, update: Update, batch: Batch) -> None:
        """Counts updates that were not applied because the loss was not finite.

        Raises:
            UserError: three in a row; the rows are named.
        """
        if update.applied:
            self.nonfinite_in_a_row = 0
            return
        self.nonfinite_in_a_row += 1
        rows = sorted({batch.objects("row")[i] for i in update.bad_rows})
        self.events.append("nonfinite", f"step {self.step + 1}: loss not finite, update not applied; data rows {rows}")
        if self.nonfinite_in_a_row == NONFINITE_LIMIT:
            raise UserError(
                f"the loss was not finite {NONFINITE_LIMIT} updates in a row; last in data rows {rows or 'unknown'}",
                why=f"loss {update.metrics.get('actor/loss', math.nan)}, "
                f"gradient norm {update.metrics.get('actor/grad_norm', math.nan)}; no such update was applied",
                fix="lower optim.lr, look at these rows, and start from the last checkpoint",
            )

    def save(self, step: int) -> None:
        """Writes the checkpoint of a step, and lets go of the journal that no resume can need."""
        checkpoints = self.folder.checkpoints
        save_checkpoint(
            checkpoints,
            step,
            write_weights=lambda folder: write_weights(self.model, self.tokenizer, folder),
            engine_state=self.engine.state(),
            run_state={
                "drawn": self.sampler.drawn,
                "data": self.prompts.fingerprint,
                "nonfinite_in_a_row": self.nonfinite_in_a_row,
            },
            keep=self.config.checkpoint.keep,
        )
        self.saved_step = step
        self.journal.forget_up_to(saved_steps(checkpoints)[0])

    def export(self) -> Path:
        """Writes the model as a plain Hugging Face folder, ``model/`` in the run's folder."""
        target = self.folder.path / "model"
        export_model(self.model, self.tokenizer, target)
        return target

    def restore(self) -> None:
        """Goes on from the newest checkpoint, if there is one.

        Raises:
            UserError: it is damaged, of another model, of other data, or the run is already at its end.
        """
        steps = saved_steps(self.folder.checkpoints)
        if steps:
            folder = step_folder(self.folder.checkpoints, steps[-1])
            engine_state, run_state = read_checkpoint(folder)
            if run_state["data"] != self.prompts.fingerprint:
                raise UserError(
                    f"the data in {self.prompts.source} is not what the run in {self.folder.path} began with",
                    why="going on would draw other prompts than the records say",
                    fix="restore the data, or choose another run.folder",
                )
            read_weights(self.model, folder)
            self.engine.load(engine_state)
            self.sampler.drawn = run_state["drawn"]
            self.nonfinite_in_a_row = run_state["nonfinite_in_a_row"]
            self.step = self.saved_step = steps[-1]
            self.events.append("resume", f"going on after step {self.step}")
        if self.step >= self.config.train.steps:
            raise UserError(
                f"the run in {self.folder.path} is already done: {self.step} of {self.config.train.steps} steps",
                fix="raise train.steps to train longer, or choose another run.folder",
            )
        self.trackers.metrics.truncate_after(self.step if steps else -1)


def open_run(config: RlConfig, *, reward: Callable[..., Any] | None = None) -> RlRun:
    """Opens the run that a configuration describes, going on where its folder's records end.

    Args:
        config: the configuration.
        reward: a function to use instead of ``reward.function``, with the same arguments.

    Raises:
        UserError: something in the configuration, the data or the folder is wrong.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    stop = StopRequest(config.run.max_minutes)
    resolved = config.model_dump(mode="json")
    folder = RunFolder(Path(config.run.folder), resolved, resume=config.run.resume)
    try:
        return _assemble(config, folder, stop, resolved, reward)
    except BaseException:
        folder.close()
        raise


def _assemble(
    config: RlConfig, folder: RunFolder, stop: StopRequest, resolved: dict[str, Any], reward: Callable[..., Any] | None
) -> RlRun:
    seed, t = config.run.seed, config.train
    events = EventLog(folder.path / "events.jsonl")
    if folder.changed_keys:
        events.append("config", f"settings changed since the run began: {', '.join(folder.changed_keys)}")
    model, tokenizer = load_model(config.model.path, seed=seed)
    if config.model.lora is not None:
        model = add_lora(model, config.model.lora, seed=seed)
    assert config.data.train is not None
    prompts = load_prompts(config.data.train, config.data, tokenizer, seed=seed)
    evaluated = load_prompts(config.data.eval, config.data, tokenizer, seed=seed) if config.data.eval else None
    scorer = RewardFunction(reward, reward.__name__) if reward else load_reward(config.reward.function)
    updates = t.steps * t.epochs_per_step * (t.prompts_per_step * t.samples_per_prompt // sequences_per_update(config))
    engine = LocalEngine(
        model,
        config.optim,
        total_steps=updates,
        tokens_per_microbatch=t.tokens_per_microbatch,
        device=pick_device(config.run.device),
    )
    rollout = make_rollout(config, model, tokenizer, folder.path)
    sampling = Sampling(config.rollout.max_response_tokens, config.rollout.temperature, stop_ids(model, tokenizer))
    journal = Journal(folder.path / "journal")
    run = RlRun(
        config=config,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        engine=engine,
        rollout=rollout,
        source=None,  # type: ignore[arg-type]  # needs the run's decode, below
        reward=scorer,
        prompts=prompts,
        eval_prompts=evaluated,
        sampler=Sampler(len(prompts), seed=seed, shuffle=config.data.shuffle),
        journal=journal,
        trackers=Trackers(folder.path, config.track, resolved_config=resolved, total_steps=t.steps, title="train"),
        events=events,
        stop=stop,
    )
    run.source = GroupSource(
        rollout,
        prompts.__getitem__,
        scorer,
        decode=run.decode,
        sampling=sampling,
        samples=t.samples_per_prompt,
        seed=seed,
        journal=journal,
        whole_step=config.rollout.engine == "inline",
        should_stop=stop.requested,
    )
    run.restore()
    run.trackers.start(run.step)
    run.publish(run.step)
    return run


def sequences_per_update(config: RlConfig) -> int:
    """Answers in one optimizer step: as configured, else all of a step's."""
    t = config.train
    return t.sequences_per_update or t.prompts_per_step * t.samples_per_prompt


def make_rollout(
    config: RlConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> RolloutEngine:
    """The generation engine of ``rollout.engine``."""
    r = config.rollout
    if r.engine == "inline":
        return InlineEngine(model, max_cache_tokens=r.max_cache_tokens)
    from hybridflow.rollout.vllm import VllmEngine  # vLLM is an extra, and takes seconds to import

    start = folder / "rollout-model"  # vLLM starts from a folder; its weights are replaced by the first publication
    export_model(model, tokenizer, start)
    longest = config.data.max_prompt_tokens + r.max_response_tokens
    return VllmEngine(start, max_model_len=longest, seed=config.run.seed, engine_args=r.engine_args)
