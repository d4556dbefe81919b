"""The typed sections of a run's configuration. Importable without torch.

Sizes say their unit in their name and are never per device: `prompts_per_step` prompts are drawn for a step,
each is answered `samples_per_prompt` times, and one optimizer step takes `sequences_per_update` of those answers.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from hybridflow.config.algorithms import ADVANTAGES
from hybridflow.config.combinations import check_algorithm
from hybridflow.config.data import PromptDataSection, SftDataSection
from hybridflow.config.inherit import inherited
from hybridflow.config.learning import AlgorithmSection as AlgorithmSection
from hybridflow.config.learning import FilterSection, ReweightSection
from hybridflow.config.paths import ReadPath, WrittenPath
from hybridflow.config.pieces import needs_of
from hybridflow.config.placement import EngineSection as EngineSection
from hybridflow.config.placement import PlacementSection as PlacementSection
from hybridflow.config.placement import check_placement
from hybridflow.config.rewards import RewardSection as RewardSection
from hybridflow.config.rollout import RolloutSection as RolloutSection
from hybridflow.config.section import Section as Section
from hybridflow.errors import nearest

Decay = Annotated[float, Field(ge=0, lt=1)]


class RunSection(Section):
    """Where the run lives and how it is repeated."""

    folder: WrittenPath = Field(description="Folder of the run: metrics, rollouts, journal, checkpoints, report.")
    seed: int = Field(0, ge=0, description="Seed of everything random: noise, data order, fresh weights.")
    resume: Literal["auto", "never", "moved"] = Field(
        "auto",
        description="auto: go on where the folder's last checkpoint and journal end; never: refuse such a folder; "
        "moved: as auto, where files of the model and the data are elsewhere now and what is in them does not tell.",
    )
    threads: PositiveInt | None = Field(
        None, description="torch threads; unset leaves torch's own choice. Part of what makes a run repeat bit for bit."
    )
    max_minutes: PositiveFloat | None = Field(
        None, description="Wall-clock limit: when it is reached the run saves a checkpoint and says how to go on."
    )
    device: Literal["auto", "cpu", "cuda", "npu"] = Field(
        "auto", description="Where models run; auto takes an accelerator if any. cuda is AMD's ROCm too."
    )


class LoraSection(Section):
    """Low-rank adapters (peft) instead of full training."""

    rank: PositiveInt = Field(8, description="Rank of the adapter matrices.")
    alpha: PositiveFloat = Field(16, description="Scale: the adapter's output is multiplied by alpha / rank.")
    target_modules: str | list[str] = Field(
        "all-linear", description="Modules that get adapters: ends of their paths, such as q_proj, or all-linear."
    )


class ModelSection(Section):
    """The model to train or to ask."""

    path: ReadPath = Field(
        description="Hugging Face folder, org/name on the hub, modelscope://org/name, or file.py:function returning "
        "(model, tokenizer)."
    )
    lora: LoraSection | None = Field(None, description="Train adapters of this shape; unset trains all weights.")
    packing: bool = Field(
        True,
        description="Run sequences side by side without padding. false is for families that cannot: they are padded, "
        "with their own attention.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep only each layer's input for the backward pass and compute the rest again: less memory for "
        "long sequences, for one more forward pass.",
    )
    liger: bool = Field(
        False,
        description="Use Liger's fused kernels (norms, rotary embedding, gated layers) on a GPU; needs "
        "hybridflow[liger].",
    )
    trust_remote_code: bool = Field(
        False, description="Run code that the model's folder brings along; only for code that you have read."
    )


class RlModelSection(ModelSection):
    """The model to train, and the one that it is held against."""

    reference: ReadPath | None = Field(
        None,
        description="The reference of the KL terms (algorithm.kl_reward_coef, kl_loss_coef), as in model.path; unset: "
        "the model that the run began with. Its weights never change.",
    )
    reference_engine: EngineSection | None = Field(
        None, description="How the reference is computed: what differs from engine; unset: nothing."
    )


class OptimSection(Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-6, gt=0, description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's decay rates.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, on matrices only.")
    clip_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this global norm.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Decay after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps over which the rate rises linearly.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Where the decay ends, as a share of lr.")


class CriticSection(Section):
    """The model that says what a state is worth, for advantages that need one."""

    path: ReadPath | None = Field(
        None, description="Where its trunk begins, as in model.path; unset: the actor's model."
    )
    lora: LoraSection | None = Field(None, description="Train adapters of this shape; unset trains all weights.")
    shared_trunk: bool = Field(
        False,
        description="The value head stands on the actor's own trunk and is trained in the actor's updates, with weight "
        "algorithm.value_coef; there is no second model.",
    )
    optim: OptimSection | None = Field(
        None, description="AdamW of the critic and its schedule: what differs from optim; unset: nothing."
    )
    engine: EngineSection | None = Field(
        None, description="How the critic is computed: what differs from engine; unset: nothing."
    )
    epochs_per_step: PositiveInt | None = Field(
        None, description="The critic's own passes over a step's answers; unset: as in train.epochs_per_step."
    )
    warmup_steps: int = Field(0, ge=0, description="First steps of the run, in which the critic alone is trained.")


class LengthSection(Section):
    """How long a run is: the section ``train`` of every kind of run that trains goes on from it."""

    ends: ClassVar[tuple[str, ...]] = ("steps", "epochs")  # the keys that decide where the run ends

    steps: PositiveInt | None = Field(None, description="Steps of the run. Give this or train.epochs.")
    epochs: PositiveInt | None = Field(None, description="Passes over the training rows, instead of train.steps.")

    @property
    def longer(self) -> str:
        """What makes the run longer, as an advice."""
        return "raise train.steps (or train.epochs)"

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            given = "both are" if self.steps else "neither is"
            raise ValueError(f"give train.steps or train.epochs, one of them; {given} given")
        return self


class RlTrainSection(LengthSection):
    """How much is generated and trained on."""

    steps: PositiveInt | None = Field(
        None, description="Steps of the run: generate, score, update, publish. Give this or train.epochs."
    )
    epochs: PositiveInt | None = Field(
        None,
        description="Passes over the training rows, instead of train.steps: as many steps as find their prompts in "
        "them. Rows left over at the end of an epoch open the next one's first step.",
    )
    prompts_per_step: PositiveInt = Field(description="Prompts drawn for one step.")
    samples_per_prompt: PositiveInt = Field(description="Answers generated for each prompt (the group).")
    sequences_per_update: PositiveInt | None = Field(
        None, description="Answers in one optimizer step; unset: all of the step's, one on-policy update."
    )
    epochs_per_step: PositiveInt = Field(1, description="Passes over a step's answers.")
    tokens_per_microbatch: PositiveInt = Field(16_384, description="Most tokens in one forward pass.")
    skip_zero_advantage: bool = Field(
        True,
        description="Leave out answers whose loss is zero whatever the weights (as a rule groups of equal reward). "
        "They still count in denominators, so the gradient is the same.",
    )


class SftTrainSection(LengthSection):
    """How much to train on."""

    ends: ClassVar[tuple[str, ...]] = (*LengthSection.ends, "stop_below_loss")

    steps: PositiveInt | None = Field(
        None, description="Optimizer steps (at most, if stop_below_loss is set). Give this or train.epochs."
    )
    epochs: PositiveInt | None = Field(
        None,
        description="Passes over the rows, instead of train.steps; rows left over open the next epoch's first step.",
    )
    sequences_per_update: PositiveInt = Field(64, description="Conversations in one optimizer step.")
    tokens_per_microbatch: PositiveInt = Field(16_384, description="Most tokens in one forward pass.")
    stop_below_loss: float | None = Field(
        None, gt=0, description="End early once the mean loss of the last 20 steps is below this."
    )

    @property
    def longer(self) -> str:
        """What makes the run longer, as an advice."""
        return super().longer + " or lower train.stop_below_loss" * (self.stop_below_loss is not None)


class EvalSection(Section):
    """Held-out evaluation; its noise is its own, so that it never changes what a run trains on."""

    every: int = Field(0, ge=0, description="Evaluate after every so many steps; 0: only before and after training.")
    before_training: bool = Field(True, description="Whether to evaluate the untrained model too.")
    max_rows: PositiveInt | None = Field(None, description="Use only the first rows of the evaluation data.")
    samples_per_prompt: PositiveInt = Field(1, description="Answers to each prompt; more than one need a temperature.")
    temperature: float = Field(0.0, ge=0, description="Divides the logits; 0 takes the most likely token (greedy).")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample among the likeliest tokens that make up this share.")
    top_k: int = Field(0, ge=0, description="Sample among so many likeliest tokens; 0: among all.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Sample among tokens at least this share as likely as the likeliest one."
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="Makes tokens less likely that the prompt or the answer has already; 1: no change."
    )
    logit_bias: dict[int, float] = Field(
        default_factory=dict, description="Added to the logits of these token ids, for example {17: -5}."
    )
    k: list[PositiveInt] | None = Field(
        None,
        description="The k of pass@k and maj@k; unset: 1, 2, 4, ... and samples_per_prompt itself, where that is more "
        "than one.",
    )
    success_threshold: float = Field(
        1.0, description="An answer with at least this reward is a success, for pass@k. Means take rewards as they are."
    )
    answer: ReadPath | None = Field(
        None,
        description="file.py:function from the text of a response to the answer that maj@k counts as a vote; unset: "
        "the whole response.",
    )

    def ks(self) -> list[int]:
        """The k of pass@k and maj@k, ascending; empty if every prompt has one answer and nothing was asked for."""
        n = self.samples_per_prompt
        if self.k is not None:
            return sorted(set(self.k))
        return sorted({n, *(2**i for i in range(n.bit_length()) if 2**i <= n)}) if n > 1 else []

    def metric_names(self) -> list[str]:
        """What is measured of each data source, without its name: ``mean@4``, ``pass@2``, ``maj@4/mean``."""
        passed = [f"pass@{k}" for k in self.ks()]
        return [f"mean@{self.samples_per_prompt}", *passed, *(f"maj@{k}/mean" for k in self.ks() if k > 1)]

    @model_validator(mode="after")
    def _check_samples(self) -> EvalSection:
        n = self.samples_per_prompt
        if n > 1 and self.temperature == 0:
            raise ValueError(
                f"eval.samples_per_prompt is {n}, but eval.temperature is 0: all greedy answers to a prompt are the "
                "same; set eval.temperature, for example to 1"
            )
        large = [k for k in self.k or [] if k > n]
        if large:
            raise ValueError(
                f"eval.k asks for pass@{large[0]}, but eval.samples_per_prompt is {n}: no {large[0]} answers can be "
                f"taken out of {n}; raise eval.samples_per_prompt to {max(large)} or lower eval.k"
            )
        return self


class CheckpointSection(Section):
    """When to save, and what to keep."""

    every: int = Field(0, ge=0, description="Save after every so many steps; 0: only at the end.")
    keep: PositiveInt = Field(2, description="Newest checkpoints kept; older ones are deleted.")
    best: str | None = Field(
        None,
        description="A held-out metric, such as val-core/SOURCE/reward/mean@1. The step that is best by it is saved, "
        "and kept besides the newest; checkpoints/best.json says which it is.",
    )
    best_mode: Literal["max", "min"] = Field("max", description="Whether a higher or a lower value is better.")
    asynchronous: bool = Field(
        False, description="Copy what is to be saved and write it while the next step runs; a full copy in host memory."
    )


class TrackSection(Section):
    """Where metrics go besides metrics.jsonl."""

    console: bool = Field(True, description="Live progress in the terminal.")
    tensorboard: bool = Field(False, description="TensorBoard event files in the run's folder.")
    wandb: bool = Field(False, description="Weights & Biases; WANDB_MODE=offline keeps it on this machine.")
    project: str = Field("hybridflow", description="Project name for trackers that have one.")
    rollouts_every: int = Field(1, ge=0, description="Write rollouts/step-*.parquet every so many steps; 0: never.")


def _check_best(name: str, evaluation: EvalSection, *, has_rows: bool) -> None:
    if not has_rows:
        raise ValueError(f"checkpoint.best is {name}, which is never measured: data.eval names no evaluation rows")
    known = [f"val-core/SOURCE/reward/{metric}" for metric in evaluation.metric_names()]
    prefix, sign, metric = name.partition("/reward/")
    if not (prefix.startswith("val-core/") and sign and metric in evaluation.metric_names()):
        raise ValueError(f"checkpoint.best {name!r} is not a metric of the evaluation; {nearest(name, known)}")


class RlConfig(Section):
    """A reinforcement-learning run: `hybridflow train`."""

    run: RunSection
    model: RlModelSection
    data: PromptDataSection
    reward: RewardSection
    rollout: RolloutSection = RolloutSection()
    algorithm: AlgorithmSection = Field(default_factory=lambda: AlgorithmSection.model_validate({}))
    filter: FilterSection = FilterSection()
    reweight: ReweightSection | None = Field(None, description="Draw some answers of a step again (PF-PPO).")
    train: RlTrainSection
    optim: OptimSection = OptimSection()
    engine: EngineSection = EngineSection()
    placement: PlacementSection = PlacementSection()
    critic: CriticSection | None = Field(None, description="The critic, of advantages that need one (gae).")
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    track: TrackSection = TrackSection()

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: object) -> object:
        return inherited(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_sizes(self) -> RlConfig:
        t = self.train
        if needs_of(self.algorithm.advantage, ADVANTAGES).needs_group and t.samples_per_prompt < 2:
            raise ValueError(
                f"train.samples_per_prompt is {t.samples_per_prompt}, but the {self.algorithm.advantage} advantage "
                "compares answers to one prompt: give at least 2"
            )
        check_algorithm(self)
        check_placement(self)
        sequences = t.prompts_per_step * t.samples_per_prompt
        if t.sequences_per_update is not None and sequences % t.sequences_per_update:
            raise ValueError(
                f"train.sequences_per_update {t.sequences_per_update} does not divide the {sequences} answers of a "
                f"step ({t.prompts_per_step} prompts x {t.samples_per_prompt} samples)"
            )
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        for key, room in [
            ("train.tokens_per_microbatch", t.tokens_per_microbatch),
            ("rollout.max_cache_tokens", self.rollout.max_cache_tokens),
        ]:
            if room < longest:
                raise ValueError(
                    f"{key} is {room}, but one sequence can have {longest} tokens (data.max_prompt_tokens "
                    f"{self.data.max_prompt_tokens} + rollout.max_response_tokens {self.rollout.max_response_tokens}); "
                    f"set {key}={longest} or more, or lower one of the two limits"
                )
        if self.data.train is None:
            raise ValueError("data.train is missing: reinforcement learning needs prompts")
        if self.rollout.engine == "sglang" and self.model.lora is not None and self.rollout.lora != "merged":
            raise ValueError(
                "rollout.engine sglang takes no adapters alone (model.lora): set rollout.lora=merged, which adds them "
                "into full weights"
            )
        if self.eval.every and self.data.eval is None:
            raise ValueError("eval.every is set, but data.eval names no evaluation rows")
        if self.checkpoint.best is not None:
            _check_best(self.checkpoint.best, self.eval, has_rows=self.data.eval is not None)
        return self


class SftConfig(Section):
    """A supervised fine-tuning run: `hybridflow sft`."""

    run: RunSection
    model: ModelSection
    data: SftDataSection
    train: SftTrainSection
    optim: OptimSection = OptimSection()
    engine: EngineSection = EngineSection()
    placement: PlacementSection = PlacementSection()
    checkpoint: CheckpointSection = CheckpointSection()
    track: TrackSection = TrackSection()

    @model_validator(mode="after")
    def _check_sizes(self) -> SftConfig:
        check_placement(self)
        if self.checkpoint.best is not None:
            raise ValueError(
                f"checkpoint.best is {self.checkpoint.best}, but supervised fine-tuning measures nothing held out; "
                "leave it out"
            )
        if self.train.tokens_per_microbatch < self.data.max_tokens:
            raise ValueError(
                f"train.tokens_per_microbatch is {self.train.tokens_per_microbatch}, but one conversation can have "
                f"data.max_tokens = {self.data.max_tokens}; set it to {self.data.max_tokens} or more, or lower "
                "data.max_tokens"
            )
        return self


class EvalConfig(Section):
    """An evaluation: `hybridflow eval`."""

    run: RunSection
    model: ModelSection
    data: PromptDataSection
    reward: RewardSection
    rollout: RolloutSection = RolloutSection()
    eval: EvalSection = EvalSection()

    @model_validator(mode="after")
    def _check_data(self) -> EvalConfig:
        if self.data.eval is None:
            raise ValueError("data.eval is missing: there is nothing to evaluate on")
        if self.model.lora is not None:
            raise ValueError(
                "model.lora is for training; to evaluate adapters, write them into a model with `hybridflow export RUN "
                "FOLDER` and give that folder as model.path"
            )
        return self
