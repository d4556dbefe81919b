"""The typed sections of a run's configuration. Importable without torch.

Sizes say their unit in their name and are never per device: `prompts_per_step` prompts are drawn for a step,
each is answered `samples_per_prompt` times, and one optimizer step takes `sequences_per_update` of those answers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from hybridflow.config.algorithms import ADVANTAGES, AGGREGATIONS, POLICY_LOSSES, PRESETS
from hybridflow.errors import nearest

Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A section: unknown keys are errors, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RunSection(Section):
    """Where the run lives and how it is repeated."""

    folder: str = Field(description="Folder of the run: metrics, rollouts, journal, checkpoints, report.")
    seed: int = Field(0, ge=0, description="Seed of everything random: noise, data order, fresh weights.")
    resume: Literal["auto", "never"] = Field(
        "auto",
        description="auto: go on where the folder's last checkpoint and journal end; never: refuse such a folder.",
    )
    threads: PositiveInt | None = Field(
        None, description="torch threads; unset leaves torch's own choice. Part of what makes a run repeat bit for bit."
    )
    max_minutes: PositiveFloat | None = Field(
        None, description="Wall-clock limit: when it is reached the run saves a checkpoint and says how to go on."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs; auto takes a GPU if any.")


class LoraSection(Section):
    """Low-rank adapters (peft) instead of full training."""

    rank: PositiveInt = Field(8, description="Rank of the adapter matrices.")
    alpha: PositiveFloat = Field(16, description="Scale: the adapter's output is multiplied by alpha / rank.")
    target_modules: str | list[str] = Field(
        "all-linear", description="Modules that get adapters: names, or all-linear."
    )


class ModelSection(Section):
    """The model to train or to ask."""

    path: str = Field(description="Hugging Face folder, or file.py:function returning (model, tokenizer).")
    lora: LoraSection | None = Field(None, description="Train adapters of this shape; unset trains all weights.")


class PromptDataSection(Section):
    """Rows with prompts, for reinforcement learning and evaluation."""

    train: str | None = Field(None, description="Training rows: .jsonl, .parquet, or file.py:function returning dicts.")
    eval: str | None = Field(None, description="Evaluation rows, same forms.")
    prompt_key: str = Field("prompt", description="Column with the prompt: a string or a list of chat messages.")
    ground_truth_key: str = Field("ground_truth", description="Column that the reward compares with; dots go inside.")
    max_prompt_tokens: PositiveInt = Field(1024, description="Longest prompt allowed, in tokens after the template.")
    shuffle: bool = Field(True, description="Whether each epoch has its own random order.")


class SftDataSection(Section):
    """Conversations for supervised fine-tuning."""

    train: str = Field(description="Training rows: .jsonl, .parquet, or file.py:function returning dicts.")
    messages_key: str = Field("messages", description="Column with the conversation: a list of chat messages.")
    max_tokens: PositiveInt = Field(2048, description="Longest conversation allowed, in tokens.")
    shuffle: bool = Field(True, description="Whether each epoch has its own random order.")


class RewardSection(Section):
    """What an answer is worth."""

    function: str = Field(
        description="file.py:function. It takes any of response, ground_truth, prompt, row and returns a number; "
        "with responses (a list) it scores a whole group and returns as many numbers."
    )


class RolloutSection(Section):
    """How answers are generated."""

    engine: Literal["inline", "vllm"] = Field("inline", description="inline: the training process's own model; vllm.")
    temperature: float = Field(1.0, gt=0, description="Divides the logits when training samples are drawn.")
    max_response_tokens: PositiveInt = Field(1024, description="Longest answer, in tokens (its stop token counts).")
    max_cache_tokens: PositiveInt = Field(
        262_144, description="Bound on the inline engine's key-value cache, in tokens over all running answers."
    )
    engine_args: dict[str, int | float | str | bool] = Field(
        default_factory=dict, description="Further arguments of the engine itself (vLLM's LLM)."
    )


class AlgorithmSection(Section):
    """The three pieces of the algorithm and their values. A preset fills what is not given."""

    preset: str = Field("grpo", description="Named choice of all the values below.")
    advantage: str = Field("grpo", description="Advantage estimator.")
    normalize_by_std: bool = Field(True, description="Divide a group's advantages by its standard deviation.")
    policy_loss: str = Field("ppo_clip", description="Per-token policy loss.")
    clip_low: float = Field(0.2, ge=0, lt=1, description="The ratio is clipped below at 1 - clip_low.")
    clip_high: float = Field(0.2, ge=0, description="The ratio is clipped above at 1 + clip_high.")
    clip_dual: float | None = Field(
        None, gt=1, description="Bound c of the dual clip for negative advantages; unset: none."
    )
    aggregation: str = Field("token-mean", description="How token losses become one number.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    old_logp: Literal["auto", "recompute", "rollout"] = Field(
        "auto",
        description="Where the ratio's denominator comes from. auto: the current policy itself when a step makes one "
        "update, else recompute; recompute: a forward pass before the step's updates; rollout: the sampler's.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "grpo")
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; {nearest(str(preset), PRESETS)}")
        return {**PRESETS[preset], **values, "preset": preset}

    @model_validator(mode="after")
    def _check_names(self) -> AlgorithmSection:
        for what, name, known in [
            ("advantage", self.advantage, ADVANTAGES),
            ("policy_loss", self.policy_loss, POLICY_LOSSES),
            ("aggregation", self.aggregation, AGGREGATIONS),
        ]:
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}; {nearest(name, known)}")
        return self


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


class RlTrainSection(Section):
    """How much is generated and trained on."""

    steps: PositiveInt = Field(description="Steps of the run: generate, score, update, publish.")
    prompts_per_step: PositiveInt = Field(description="Prompts drawn for one step.")
    samples_per_prompt: PositiveInt = Field(description="Answers generated for each prompt (the group).")
    sequences_per_update: PositiveInt | None = Field(
        None, description="Answers in one optimizer step; unset: all of the step's, one on-policy update."
    )
    epochs_per_step: PositiveInt = Field(1, description="Passes over a step's answers.")
    tokens_per_microbatch: PositiveInt = Field(16_384, description="Most tokens in one forward pass.")
    skip_zero_advantage: bool = Field(
        True,
        description="Leave out answers whose loss is zero whatever the weights (groups of equal reward). They still "
        "count in denominators, so the gradient is the same.",
    )


class SftTrainSection(Section):
    """How much to train on."""

    steps: PositiveInt = Field(description="Optimizer steps (at most, if stop_below_loss is set).")
    sequences_per_update: PositiveInt = Field(64, description="Conversations in one optimizer step.")
    tokens_per_microbatch: PositiveInt = Field(16_384, description="Most tokens in one forward pass.")
    stop_below_loss: float | None = Field(
        None, gt=0, description="End early once the mean loss of the last 20 steps is below this."
    )


class EvalSection(Section):
    """Held-out evaluation with greedy decoding; it never touches training noise."""

    every: int = Field(0, ge=0, description="Evaluate after every so many steps; 0: only before and after training.")
    before_training: bool = Field(True, description="Whether to evaluate the untrained model too.")
    max_rows: PositiveInt | None = Field(None, description="Use only the first rows of the evaluation data.")


class CheckpointSection(Section):
    """When to save."""

    every: int = Field(0, ge=0, description="Save after every so many steps; 0: only at the end.")
    keep: PositiveInt = Field(2, description="Newest checkpoints kept; older ones are deleted.")


class TrackSection(Section):
    """Where metrics go besides metrics.jsonl."""

    console: bool = Field(True, description="Live progress in the terminal.")
    tensorboard: bool = Field(False, description="TensorBoard event files in the run's folder.")
    wandb: bool = Field(False, description="Weights & Biases; WANDB_MODE=offline keeps it on this machine.")
    project: str = Field("hybridflow", description="Project name for trackers that have one.")
    rollouts_every: int = Field(1, ge=0, description="Write rollouts/step-*.parquet every so many steps; 0: never.")


class RlConfig(Section):
    """A reinforcement-learning run: `hybridflow train`."""

    run: RunSection
    model: ModelSection
    data: PromptDataSection
    reward: RewardSection
    rollout: RolloutSection = RolloutSection()
    algorithm: AlgorithmSection = Field(default_factory=lambda: AlgorithmSection.model_validate({}))
    train: RlTrainSection
    optim: OptimSection = OptimSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    track: TrackSection = TrackSection()

    @model_validator(mode="after")
    def _check_sizes(self) -> RlConfig:
        t = self.train
        if ADVANTAGES[self.algorithm.advantage].needs_group and t.samples_per_prompt < 2:
            raise ValueError(
                f"train.samples_per_prompt is {t.samples_per_prompt}, but the {self.algorithm.advantage} advantage "
                "compares answers to one prompt: give at least 2"
            )
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
                    f"{self.data.max_prompt_tokens} + rollout.max_response_tokens {self.rollout.max_response_tokens})"
                )
        if self.data.train is None:
            raise ValueError("data.train is missing: reinforcement learning needs prompts")
        if self.rollout.engine == "vllm" and self.model.lora is not None:
            raise ValueError("rollout.engine vllm cannot sample from adapters (model.lora): set rollout.engine=inline")
        if self.eval.every and self.data.eval is None:
            raise ValueError("eval.every is set, but data.eval names no evaluation rows")
        return self


class SftConfig(Section):
    """A supervised fine-tuning run: `hybridflow sft`."""

    run: RunSection
    model: ModelSection
    data: SftDataSection
    train: SftTrainSection
    optim: OptimSection = OptimSection()
    checkpoint: CheckpointSection = CheckpointSection()
    track: TrackSection = TrackSection()

    @model_validator(mode="after")
    def _check_sizes(self) -> SftConfig:
        if self.train.tokens_per_microbatch < self.data.max_tokens:
            raise ValueError(
                f"train.tokens_per_microbatch is {self.train.tokens_per_microbatch}, but one conversation can have "
                f"data.max_tokens = {self.data.max_tokens}"
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
        return self
