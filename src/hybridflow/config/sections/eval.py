"""The section of evaluations."""

from __future__ import annotations

from pydantic import Field, PositiveInt, model_validator

from hybridflow.config.paths import ReadPath
from hybridflow.config.sections.base import Section
from hybridflow.errors import nearest


class EvalSection(Section):
    """Held-out evaluation. It has sampling noise of its own, so it never changes what a run trains on."""

    every: int = Field(0, ge=0, description="Steps between two evaluations; 0: only before and after training.")
    before_training: bool = Field(True, description="Whether to evaluate the untrained model too.")
    max_rows: PositiveInt | None = Field(
        None, description="Use only this many of the first evaluation rows; unset: all."
    )
    samples_per_prompt: PositiveInt = Field(
        1, description="Number of responses to each prompt; more than one needs eval.temperature."
    )
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0: take the likeliest token (greedy).")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample among the fewest likeliest tokens whose probabilities add up to this (nucleus sampling).",
    )
    top_k: int = Field(0, ge=0, description="Sample among this many likeliest tokens; 0: among all.")
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Sample among the tokens whose probability is at least this share of the likeliest token's.",
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        description="Makes tokens less likely that already occur in the prompt or the response; 1: no change.",
    )
    logit_bias: dict[int, float] = Field(
        default_factory=dict, description="Numbers to add to the logits, by token id, for example {17: -5}."
    )
    k: list[PositiveInt] | None = Field(
        None,
        description="The k of pass@k and maj@k; unset: 1, 2, 4, ... and samples_per_prompt itself, where that is more "
        "than one.",
    )
    success_threshold: float = Field(
        1.0,
        description="Least reward of a response that counts as a success for pass@k. Means use rewards as they are.",
    )
    answer: ReadPath | None = Field(
        None,
        description="file.py:function that takes the text of a response and returns the answer that maj@k counts as a "
        "vote; unset: the whole response.",
    )

    def ks(self) -> list[int]:
        """Returns the k of pass@k and maj@k, ascending; empty if every prompt has one response and the configuration
        asks for none.
        """
        n = self.samples_per_prompt
        if self.k is not None:
            return sorted(set(self.k))
        return sorted({n, *(2**i for i in range(n.bit_length()) if 2**i <= n)}) if n > 1 else []

    def metric_names(self) -> list[str]:
        """Returns the names of a data source's metrics, without the source: ``mean@4``, ``pass@2``, ``maj@4/mean``."""
        passed = [f"pass@{k}" for k in self.ks()]
        return [f"mean@{self.samples_per_prompt}", *passed, *(f"maj@{k}/mean" for k in self.ks() if k > 1)]

    @model_validator(mode="after")
    def _check_samples(self) -> EvalSection:
        n = self.samples_per_prompt
        if n > 1 and self.temperature == 0:
            raise ValueError(
                f"eval.samples_per_prompt is {n}, but eval.temperature is 0: all greedy responses to a prompt are the "
                "same; set eval.temperature, for example to 1"
            )
        large = [k for k in self.k or [] if k > n]
        if large:
            raise ValueError(
                f"eval.k asks for pass@{large[0]}, but eval.samples_per_prompt is {n}: no {large[0]} responses can be "
                f"taken out of {n}; raise eval.samples_per_prompt to {max(large)} or lower eval.k"
            )
        return self


def check_best(name: str, evaluation: EvalSection, *, has_rows: bool) -> None:
    """Raises a ValueError where ``checkpoint.best`` names a metric that no evaluation of the run measures."""
    if not has_rows:
        raise ValueError(f"checkpoint.best is {name}, which is never measured: data.eval names no evaluation rows")
    known = [f"val-core/SOURCE/reward/{metric}" for metric in evaluation.metric_names()]
    prefix, sign, metric = name.partition("/reward/")
    if not (prefix.startswith("val-core/") and sign and metric in evaluation.metric_names()):
        raise ValueError(f"checkpoint.best {name!r} is not a metric of the evaluation; {nearest(name, known)}")
