"""Putting a reinforcement-learning run together: model, engines, data, records, and where to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from hybridflow.algorithms.kl import KlController
from hybridflow.chat.special_tokens import answer_decoder
from hybridflow.checkpoint.journal import Journal
from hybridflow.checkpoint.run_folder import RunFolder
from hybridflow.checkpoint.store import saved_steps, write_best
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.pieces.needs import needs_of
from hybridflow.config.pieces.tables import ADVANTAGES
from hybridflow.data.prompts import PromptSet, load_prompts
from hybridflow.evaluation.evaluate import evaluate, never_ended, sampling_for
from hybridflow.grading.make import check_rows, data_sources, failure_policy, make_grader
from hybridflow.groups.failures import FailurePolicy
from hybridflow.groups.source import GroupSource
from hybridflow.placing.build import load_role
from hybridflow.placing.companions import Critic, make_critic, make_reference, require_companions
from hybridflow.placing.generation import training_sampling
from hybridflow.placing.handover import HandOver
from hybridflow.placing.places import Places
from hybridflow.placing.role import actor_role
from hybridflow.protocols.generation import Restarting, RolloutEngine
from hybridflow.protocols.rewards import Grader
from hybridflow.protocols.training import Scorer, TrainEngine
from hybridflow.protocols.waiting import Stopped
from hybridflow.publishing.publisher import Publisher, publisher_of
from hybridflow.runs.best import best_of, better
from hybridflow.runs.lifecycle import StopRequest
from hybridflow.runs.session import Session, opening, total_steps
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.tracking.mismatch_watch import MismatchWatch
from hybridflow.tracking.reward_watch import RewardWatch
from hybridflow.tracking.rollouts import EVALUATION, write_rollouts
from hybridflow.tracking.signal_watch import SignalWatch
from hybridflow.tracking.trackers import Trackers
from hybridflow.trainers.rl.shaping import Moments


@dataclass(kw_only=True)
class RlRun(Session):
    """Everything that the loop in `trainers.rl.loop` works with; use it as a context."""

    config: RlConfig
    rollout: RolloutEngine
    source: GroupSource
    grader: Grader
    policy: FailurePolicy
    prompts: PromptSet
    eval_prompts: PromptSet | None
    journal: Journal
    decode: Callable[[list[int]], str]
    critic: Critic | None = None
    reference: Scorer | None = None
    kl: KlController
    watch: MismatchWatch
    reward_watch: RewardWatch
    signal_watch: SignalWatch = field(default_factory=SignalWatch)
    turn: HandOver
    publisher: Publisher
    moments: Moments = field(default_factory=Moments)
    token_text: dict[int, str] = field(default_factory=dict)
    unevaluated: dict[str, float] | None = None  # metrics of the last step, whose evaluation is still to be made

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.turn.close()
        return super().__exit__(kind, error, trace)

    def texts_of(self, token_ids: list[int]) -> list[str]:
        """The text of every single token, special ones included."""
        for i in token_ids:
            if i not in self.token_text:
                self.token_text[i] = str(self.tokenizer.decode([i]))
        return [self.token_text[i] for i in token_ids]

    def watches(self) -> tuple[MismatchWatch, RewardWatch, SignalWatch]:
        """What looks at the metrics of every step, and may have something to say."""
        return self.watch, self.reward_watch, self.signal_watch

    def steps(self) -> Iterator[int]:
        """See `Session.steps`; before them, the evaluation that the run was stopped in."""
        if self.unevaluated is not None:
            step, line = self.step, self.unevaluated
            self.unevaluated = None
            found = self.evaluate(step)
            if self.unevaluated is None:
                self.note(step, line | found | {"timing_s/testing": self.clock.take()["timing_s/testing"]})
                if self.note_best(step, found) and self.best is not None:
                    write_best(self.folder.checkpoints, self.best)  # the step is saved already
            else:
                self.unevaluated = line  # stopped once more
        yield from super().steps()

    def done(self) -> bool:
        """See `Session.done`: an evaluation that the run was stopped in is still to be made."""
        return super().done() and self.unevaluated is None

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluates the weights of a step, and writes the answers; what was measured.

        Where the run is asked to stop meanwhile, answers are dropped and nothing is returned: the step's metrics then
        wait (`note`) until the run goes on and its evaluation is made.

        Raises:
            Stopped: the same before the first step, which is then not begun.
        """
        assert self.eval_prompts is not None
        config = self.config
        self.turn.to_generation()
        try:
            with self.clock.phase("testing"):
                done = evaluate(
                    self.rollout,
                    self.eval_prompts,
                    self.grader,
                    self.policy,
                    config.eval,
                    decode=self.decode,
                    sampling=sampling_for(config.eval, self.source.sampling),
                    seed=config.run.seed,
                    note=self.trackers.note if config.track.console else None,
                    should_stop=self.stop.requested,
                )
        except Stopped:
            if not step:
                raise
            self.unevaluated = {}
            self.trackers.tell(
                "evaluation", f"stopped in the evaluation of step {step}: it is made when the run goes on"
            )
            return {}
        for r in done.records:
            r |= {"step": step, "tokens": self.texts_of(r["token_ids"])}
        write_rollouts(self.folder.path / f"evaluations/step-{step:06d}.parquet", done.records, EVALUATION)
        if step == 0:
            self.advise_where_none_ended("evaluation before training", [r["finish_reason"] for r in done.records])
        return done.metrics()

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step, or keeps them for its checkpoint while its evaluation is still to be made."""
        if self.unevaluated is None:
            self.trackers.log(step, metrics)
        else:
            self.unevaluated = dict(metrics)

    def advise_where_none_ended(self, where: str, finish_reasons: list[str]) -> None:
        """Says so where not one of several answers ended by itself."""
        limit, eos = self.config.rollout.max_response_tokens, repr(self.tokenizer.eos_token)
        advice = never_ended(finish_reasons, limit, eos)
        if advice:
            self.trackers.advise(f"{where}: {advice}")

    def publish(self, version: int) -> dict[str, float]:
        """Gives the trainer's weights to the generation engine, and makes sure that it samples from them.

        Returns:
            What was measured.

        Raises:
            WeightSyncError: the engine has other weights.
        """
        self.turn.to_publication()
        return self.publisher.publish(version)

    def engines(self) -> dict[str, TrainEngine]:
        """See `Session.engines`. A critic with a model of its own has a part of its own."""
        own = self.critic is not None and not self.critic.shared
        return super().engines() | ({"critic": self.critic.engine} if own and self.critic else {})

    def extra_state(self) -> dict[str, Any]:
        """The coefficient of an adaptive KL penalty, what is known of all rewards, and what waits for an evaluation."""
        owed = {} if self.unevaluated is None else {"unevaluated": self.unevaluated}
        return {"kl_reward_coef": self.kl.coef, "reward_moments": astuple(self.moments)} | owed

    def load_extra(self, state: Mapping[str, Any]) -> None:
        """See `Session.load_extra`. A fixed coefficient is the configuration's, which may have been changed."""
        if self.kl.target is not None:
            self.kl.coef = state["kl_reward_coef"]
        self.moments = Moments(*state["reward_moments"])
        made = any(line["step"] == state["step"] for line in read_metrics(self.folder.path / "metrics.jsonl"))
        self.unevaluated = None if made else state.get("unevaluated")

    def save(self, step: int) -> None:
        """See `Session.save`. Models that are offloaded between phases come back for it."""
        self.turn.to_training()
        super().save(step)

    def finish(self) -> Path:
        """See `Session.finish`."""
        self.turn.to_training()
        return super().finish()

    def forget(self, step: int) -> None:
        """See `Session.forget`: of the journal."""
        self.journal.forget_up_to(saved_steps(self.folder.checkpoints)[-self.checkpoint.keep :][0])

    def note_best(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the step is the best so far by ``checkpoint.best``: it is then to be saved.

        Raises:
            UserError: the evaluation measures nothing of that name.
        """
        found = better(self.config.checkpoint, metrics, step, self.best)
        self.best = found or self.best
        return found is not None

    def restore(self) -> None:
        """See `Session.restore`. The best step so far follows from the metrics and the checkpoints that stand."""
        super().restore()
        lines = read_metrics(self.folder.path / "metrics.jsonl")
        for line in [*lines, *filter(None, [self.unevaluated])]:
            for watch in self.watches():
                watch.observe(line)  # what they say of these was said before
        self.best = best_of(self.config.checkpoint, lines, saved_steps(self.folder.checkpoints))
        if self.best is not None:
            write_best(self.folder.checkpoints, self.best)


def open_run(config: RlConfig, *, reward: Callable[..., Any] | None = None) -> RlRun:
    """Opens the run that a configuration describes, going on where its folder's records end.

    Args:
        config: the configuration.
        reward: a function to use instead of ``reward.function``, with the same arguments.

    Raises:
        UserError: something in the configuration, the data or the folder is wrong.
    """
    with opening(config) as (folder, stop, places, resolved):
        return _assemble(config, folder, stop, places, resolved, reward)


def _assemble(
    config: RlConfig,
    folder: RunFolder,
    stop: StopRequest,
    places: Places,
    resolved: dict[str, Any],
    reward: Callable[..., Any] | None,
) -> RlRun:
    seed, t, a = config.run.seed, config.train, config.algorithm
    tokenizer = load_role(actor_role(config, 1), outline=True)[1]
    require_companions(config, tokenizer)
    assert config.data.train is not None
    prompts = load_prompts(config.data.train, config.data, tokenizer, seed=seed)
    steps = total_steps(t.steps, t.epochs, rows=len(prompts), rows_per_step=t.prompts_per_step)
    evaluated = load_prompts(config.data.eval, config.data, tokenizer, seed=seed) if config.data.eval else None
    check_rows(config, prompts, evaluated, function=reward)
    role = actor_role(config, steps)
    engine = places.trained(role)
    rollout = places.rollout(config, role, engine, tokenizer, folder.path)
    grader = make_grader(config, places, data_sources(prompts, evaluated), function=reward)
    places.on_close(grader.close)
    policy, journal = failure_policy(config.reward), Journal(folder.path / "journal")
    trackers = Trackers(folder.path, config.track, resolved_config=resolved, total_steps=steps, title="train")
    stops = places.stop_ids(engine, tokenizer)
    decode = answer_decoder(tokenizer, stops, keep=config.reward.keep_special_tokens)
    source = GroupSource(
        rollout,
        prompts.__getitem__,
        grader,
        decode=decode,
        sampling=training_sampling(config.rollout, stops),
        samples=t.samples_per_prompt,
        seed=seed,
        greedy=needs_of(a.advantage, ADVANTAGES).needs_greedy,
        policy=policy,
        tell=trackers.advise,
        journal=journal,
        whole_step=config.rollout.engine == "inline",
        should_stop=stop.requested,
    )
    critic, reference = make_critic(config, engine, places, steps=steps), make_reference(config, engine, places)
    models = [engine, *([critic.engine] if critic else []), *([reference] if reference else [])]
    run = RlRun(
        config=config,
        folder=folder,
        places=places,
        tokenizer=tokenizer,
        engine=engine,
        rollout=rollout,
        source=source,
        grader=grader,
        policy=policy,
        prompts=prompts,
        eval_prompts=evaluated,
        sampler=prompts.sampler(seed=seed),
        journal=journal,
        decode=decode,
        critic=critic,
        reference=reference,
        kl=KlController(a.kl_reward_coef, a.kl_target, a.kl_horizon),
        watch=MismatchWatch(corrected=a.correction.active),
        reward_watch=RewardWatch({n: t.weight for n, t in (config.reward.terms or {}).items() if t.weight}),
        publisher=publisher_of(config, engine, rollout, tokenizer, keep=source.keep, note=places.events),
        turn=HandOver(rollout, models, sleeps=places.rollout_sleeps(config)),
        trackers=trackers,
        stop=stop,
        total_steps=steps,
        checkpoint=config.checkpoint,
        length=t,
        data_source=prompts.source,
        data_fingerprint=prompts.fingerprint,
    )
    if any(key.partition(".")[0] not in ("run", "track", "checkpoint", "eval") for key in folder.changed):
        journal.clear()  # its answers are of weights that the changed settings will not lead to
    run.restore()
    if isinstance(rollout, Restarting):  # what it starts again has the weights of its folder
        rollout.on_restart = lambda: run.publisher.send(rollout.version)
    run.publish(run.step)
    return run
