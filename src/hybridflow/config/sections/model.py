"""The sections that name models: the one that is trained, its adapters, its critic."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from hybridflow.config.paths import ReadPath
from hybridflow.config.sections.base import Section
from hybridflow.config.sections.engine import EngineSection
from hybridflow.config.sections.optim import OptimSection


class LoraSection(Section):
    """Low-rank adapters (peft) instead of full training."""

    rank: PositiveInt = Field(8, description="Rank of the adapter matrices.")
    alpha: PositiveFloat = Field(16, description="Scale: the adapter's output is multiplied by alpha / rank.")
    target_modules: str | list[str] = Field(
        "all-linear", description="Modules that get adapters: ends of their paths, such as q_proj, or all-linear."
    )


class ModelSection(Section):
    """The model to train or to evaluate."""

    path: ReadPath = Field(
        description="Hugging Face folder, org/name on the hub, modelscope://org/name, or file.py:function returning "
        "(model, tokenizer)."
    )
    lora: LoraSection | None = Field(None, description="Train LoRA adapters of this shape; unset: train all weights.")
    packing: bool = Field(
        True,
        description="Pack sequences into one row without padding. false: pad them, and use the model's own attention, "
        "for model families that cannot be packed.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep only each layer's input for the backward pass and recompute the rest (gradient "
        "checkpointing): less memory, at the cost of one more forward pass.",
    )
    liger: bool = Field(
        False,
        description="Use Liger's fused kernels (norms, rotary embedding, gated layers) on a GPU; needs "
        "hybridflow[liger].",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Set it only for code that you have read."
    )


class RlModelSection(ModelSection):
    """The model to train, and its reference."""

    reference: ReadPath | None = Field(
        None,
        description="The reference model of the KL terms (algorithm.kl_reward_coef, kl_loss_coef), in the form of "
        "model.path; unset: the model that the run begins with. Its weights never change.",
    )
    reference_engine: EngineSection | None = Field(
        None, description="How the reference is computed: what differs from engine; unset: nothing."
    )


class CriticSection(Section):
    """The critic, which predicts the value of a state, for advantage estimators that need one."""

    path: ReadPath | None = Field(
        None, description="Model that the critic starts from, in the form of model.path; unset: the actor's model."
    )
    lora: LoraSection | None = Field(None, description="Train LoRA adapters of this shape; unset: train all weights.")
    shared_trunk: bool = Field(
        False,
        description="Put the value head on the actor's own model, and train it in the actor's updates with weight "
        "algorithm.value_coef; there is no second model.",
    )
    optim: OptimSection | None = Field(
        None, description="AdamW of the critic and its schedule: what differs from optim; unset: nothing."
    )
    engine: EngineSection | None = Field(
        None, description="How the critic is computed: what differs from engine; unset: nothing."
    )
    epochs_per_step: PositiveInt | None = Field(
        None, description="The critic's own passes over a step's responses; unset: train.epochs_per_step."
    )
    warmup_steps: int = Field(
        0, ge=0, description="Number of steps at the start of the run in which only the critic is trained."
    )
