"""The assembly of a reinforcement-learning run: model, engines, data, records, and the step to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.agents.given import NOTHING, Given
from hybridflow.algorithms.kl import KlController
from hybridflow.chat.special_tokens import answer_decoder
from hybridflow.checkpoint.journal import Journal
from hybridflow.checkpoint.store import saved_steps, write_best
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.pieces.needs import needs_of
from hybridflow.config.pieces.tables import ADVANTAGES
from hybridflow.data.prompts import PromptSet
from hybridflow.evaluation.evaluate import Evaluation, evaluate, never_ended, sampling_for
from hybridflow.grading.make import check_rows, data_sources, failure_policy, make_grader
from hybridflow.groups.answering import Answering
from hybridflow.groups.source import GroupSource
from hybridflow.placing.acting import make_rollouts, prompts_of
from hybridflow.placing.build import load_role
from hybridflow.placing.companions import Critic, make_critic, make_reference, require_companions
from hybridflow.placing.generation import training_sampling
from hybridflow.placing.handover import HandOver
from hybridflow.placing.role import actor_role
from hybridflow.protocols.training import Scorer
from hybridflow.protocols.waiting import Stopped
from hybridflow.publishing.canary import computes_exactly
from hybridflow.publishing.publisher import Publisher, publisher_of
from hybridflow.rewards.graders.given import GivenReward, with_given
from hybridflow.runs.best import best_of, better
from hybridflow.runs.session import Opened, Session, opening, total_steps
from hybridflow.tracking.agent_watch import AgentWatch
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.tracking.mismatch_watch import MismatchWatch
from hybridflow.tracking.reward_watch import RewardWatch
from hybridflow.tracking.rollouts import EVALUATION, write_rollouts
from hybridflow.tracking.signal_watch import SignalWatch
from hybridflow.tracking.trackers import Trackers
from hybridflow.trainers.rl.shaping import Moments


class Watch(Protocol):
    """Reads the metrics of every step, and may give advice."""

    def observe(self, metrics: Mapping[str, float]) -> str | None:
        """Takes the metrics of a step; returns advice, where there is some."""


@dataclass(kw_only=True)
class RlRun(Session):
    """Everything that the loop in `trainers.rl.loop` works with; use it as a context.

    Args:
        config: the configuration.
        data: the prompts that are trained on.
        source: generates and scores groups of responses to them.
        journal: stores them.
        held_out: evaluates the weights that the generation engine has; None where there are no rows.
        critic: predicts values of states, where the algorithm has one.
        reference: the reference of the KL terms, where the algorithm has them.
        publisher: sends weights to the generation engine, and verifies them there.
        turn: whose turn it is on devices that generation and training share.
        watches: read every step's metrics.
        kl: the coefficient of the KL penalty.
        moments: of all rewards so far.
    """

    config: RlConfig
    data: PromptSet
    source: GroupSource
    journal: Journal
    held_out: Callable[[], Evaluation] | None
    critic: Critic | None
    reference: Scorer | None
    publisher: Publisher
    turn: HandOver
    watches: Sequence[Watch]
    kl: KlController
    moments: Moments = field(default_factory=Moments)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.unevaluated: dict[str, float] | None = None  # metrics of the last step, whose evaluation is still to come
        self._token_text: dict[int, str] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.turn.close()
        return super().__exit__(kind, error, trace)

    def texts_of(self, token_ids: list[int]) -> list[str]:
        """Returns the text of every single token, special ones included."""
        for i in token_ids:
            if i not in self._token_text:
                self._token_text[i] = str(self.tokenizer.decode([i]))
        return [self._token_text[i] for i in token_ids]

    def steps(self) -> Iterator[int]:
        """See `Session.steps`; before them, the evaluation that the run was stopped in."""
        if self.unevaluated is not None:
            step, line = self.step, self.unevaluated
            self.unevaluated = None
            found = self.evaluate(step)
            if self.unevaluated is None:
                self.note(step, line | found | {"timing_s/testing": self.clock.take()["timing_s/testing"]})
                if self.note_best(step, found) and self.saver.best is not None:
                    write_best(self.folder.checkpoints, self.saver.best)  # the step is saved already
            else:
                self.unevaluated = line  # stopped once more
        yield from super().steps()

    def done(self) -> bool:
        """See `Session.done`: an evaluation that the run was stopped in is still to be made."""
        return super().done() and self.unevaluated is None

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluates the weights of a step, and writes the responses; returns the metrics.

        If the run is asked to stop meanwhile, drops the responses and returns nothing: the step's metrics then wait
        (`note`) until the run resumes and its evaluation is made.

        Raises:
            Stopped: the same before the first step, which is then not begun.
        """
        assert self.held_out is not None
        self.turn.to_generation()
        self.journal.calls.open(step)
        try:
            with self.clock.phase("testing"):
                done = self.held_out()
        except Stopped:
            if not step:
                raise
            self.unevaluated = {}
            self.trackers.tell(
                "evaluation", f"stopped in the evaluation of step {step}: it is made when the run resumes"
            )
            return {}
        for r in done.records:
            r |= {"step": step, "tokens": self.texts_of(r["token_ids"])}
        write_rollouts(self.folder.path / f"evaluations/step-{step:06d}.parquet", done.records, EVALUATION)
        if step == 0:
            ends = [r["finish_reason"] for r in done.records if not r["sequence"]]  # of each response once
            self.advise_where_none_ended("evaluation before training", ends)
        return done.metrics()

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step, or keeps them for its checkpoint while its evaluation is still to be made."""
        if self.unevaluated is None:
            self.trackers.log(step, metrics)
        else:
            self.unevaluated = dict(metrics)

    def advise_where_none_ended(self, where: str, finish_reasons: list[str]) -> None:
        """Gives advice where no response of several ended before the limit."""
        limit, eos = self.config.rollout.max_response_tokens, repr(self.tokenizer.eos_token)
        advice = never_ended(finish_reasons, limit, eos)
        if advice:
            self.trackers.advise(f"{where}: {advice}")

    def publish(self, version: int) -> dict[str, float]:
        """Sends the trainer's weights to the generation engine, and verifies that it samples from them.

        Returns:
            What was measured.

        Raises:
            WeightSyncError: the engine has other weights.
        """
        self.turn.to_publication()
        return self.publisher.publish(version)

    def extra_state(self) -> dict[str, Any]:
        """Returns the coefficient of an adaptive KL penalty, the moments of all rewards, and what waits for an
        evaluation.
        """
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

    def note_best(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Returns whether the step is the best so far by ``checkpoint.best``, and is to be saved for that.

        Raises:
            UserError: the evaluation measures nothing of that name.
        """
        found = better(self.config.checkpoint, metrics, step, self.saver.best)
        self.saver.best = found or self.saver.best
        return found is not None

    def restore(self) -> None:
        """See `Session.restore`. The best step so far follows from the metrics and the existing checkpoints."""
        super().restore()
        lines = read_metrics(self.folder.path / "metrics.jsonl")
        for line in [*lines, *filter(None, [self.unevaluated])]:
            for watch in self.watches:
                watch.observe(line)  # advice on these steps was given before
        best = best_of(self.config.checkpoint, lines, saved_steps(self.folder.checkpoints))
        self.saver.best = best
        if best is not None:
            write_best(self.folder.checkpoints, best)


def open_run(config: RlConfig, *, reward: GivenReward | None = None, given: Given = NOTHING) -> RlRun:
    """Opens the run that a configuration describes; resumes it where its folder holds one.

    Args:
        config: the configuration.
        reward: a function to use instead of ``reward.function``, with the same arguments. The run records its name
            and a fingerprint of it.
        given: objects that the section ``agent`` names, see `agents.given.name_objects`.

    Raises:
        UserError: something in the configuration, the data or the folder is wrong.
    """
    config = with_given(config, reward)
    with opening(config) as opened:
        run = _assemble(config, opened, reward, given)
        if any(key.partition(".")[0] not in ("run", "track", "checkpoint", "eval") for key in run.folder.changed):
            run.journal.clear()  # its responses are from weights that the changed settings will not lead to
        run.restore()
        run.publish(run.step)
        return run


def _assemble(config: RlConfig, opened: Opened, reward: GivenReward | None, given: Given) -> RlRun:
    """Loads and starts all parts of a run, the trained model first."""
    places, a = opened.places, config.algorithm
    tokenizer = load_role(actor_role(config, 1), outline=True)[1]
    require_companions(config, tokenizer)
    prompts, evaluated = _prompts(config, tokenizer, reward, given)
    steps = total_steps(
        config.train.steps, config.train.epochs, rows=len(prompts), rows_per_step=config.train.prompts_per_step
    )
    role = actor_role(config, steps)
    engine = places.trained(role)
    rollout = places.rollout(role, engine, tokenizer, opened.folder.path)
    grader = make_grader(config, places, data_sources(prompts, evaluated), function=reward)
    places.on_close(grader.close)
    trackers = opened.trackers(steps)
    stops = engine.stop_ids(tokenizer)
    journal = Journal(opened.folder.path / "journal")
    decode = answer_decoder(tokenizer, stops, keep=config.reward.keep_special_tokens)
    rollouts = make_rollouts(
        config, tokenizer, rollout, stops, prompts, given=given, calls=journal.calls, tell=trackers.advise
    )
    places.on_close(rollouts.close)
    source = GroupSource(
        Answering(
            rollout,
            rollouts,
            grader,
            decode,
            failure_policy(config.reward),
            "fail" if config.agent is None else config.agent.on_failure,
            opened.stop.requested,
        ),
        prompts.__getitem__,
        sampling=training_sampling(config.rollout, stops),
        samples=config.train.samples_per_prompt,
        seed=config.run.seed,
        greedy=needs_of(a.advantage, ADVANTAGES).needs_greedy,
        tell=trackers.advise,
        journal=journal,
        whole_step=config.rollout.engine == "inline",
    )
    critic, reference = make_critic(config, engine, places, steps=steps), make_reference(config, engine, places)
    # A critic on the actor's own trunk is in the actor's part of a checkpoint.
    trained = {".": engine} | ({"critic": critic.engine} if critic and not critic.shared else {})
    models = [engine, *([critic.engine] if critic else []), *([reference] if reference else [])]
    publisher = publisher_of(
        role,
        engine,
        rollout,
        tokenizer,
        exact=computes_exactly(config.run.device, config.engine.dtype, config.rollout.dtype),
        read_back_every=config.rollout.read_back_every,
        keep=source.keep,
        note=places.events,
    )
    rollout.on_restart = lambda: publisher.send(rollout.version)  # a restarted replica has those of its folder
    return RlRun(
        opened=opened,
        config=config,
        tokenizer=tokenizer,
        engine=engine,
        data=prompts,
        trackers=trackers,
        saver=opened.saver(tokenizer, trained, forget=lambda: _forget(journal, opened)),
        total_steps=steps,
        source=source,
        journal=journal,
        held_out=None if evaluated is None else _held_out(config, source, evaluated, trackers),
        critic=critic,
        reference=reference,
        publisher=publisher,
        turn=HandOver(rollout, models, sleeps=places.rollout_sleeps()),
        watches=_watches(config),
        kl=KlController(a.kl_reward_coef, a.kl_target, a.kl_horizon),
    )


def _prompts(
    config: RlConfig, tokenizer: PreTrainedTokenizerBase, reward: GivenReward | None, given: Given
) -> tuple[PromptSet, PromptSet | None]:
    """Loads the rows to train on, and those to evaluate on; the reward can score all of them."""
    a = config.agent
    prompts = prompts_of(config, tokenizer, config.data.train, None if a is None else a.tasks, given)
    evaluated = prompts_of(config, tokenizer, config.data.eval, None if a is None else a.eval_tasks, given)
    assert prompts is not None, "the configuration was checked"
    check_rows(config, prompts, evaluated, function=reward)
    return prompts, evaluated


def _held_out(
    config: RlConfig, source: GroupSource, prompts: PromptSet, trackers: Trackers
) -> Callable[[], Evaluation]:
    """Returns the evaluation, which uses the engine and the grader of training."""
    return partial(
        evaluate,
        source.answering,
        prompts,
        config.eval,
        sampling=sampling_for(config.eval, source.sampling),
        seed=config.run.seed,
        note=trackers.note if config.track.console else None,
    )


def _watches(config: RlConfig) -> list[Watch]:
    terms = {name: term.weight for name, term in (config.reward.terms or {}).items() if term.weight}
    return [
        MismatchWatch(corrected=config.algorithm.correction.active),
        RewardWatch(terms),
        SignalWatch(),
        AgentWatch(),
    ]


def _forget(journal: Journal, opened: Opened) -> None:
    """Deletes the journal of steps that no kept checkpoint can need."""
    keep = opened.config.checkpoint.keep
    journal.forget_up_to(saved_steps(opened.folder.checkpoints)[-keep:][0])
