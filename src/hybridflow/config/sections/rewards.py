"""The section that says what a response is worth, and the names of the built-in rewards. Importable without torch.

A test holds the names and the table in `rewards/` together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from hybridflow.config.bounds import LARGEST_REWARD
from hybridflow.config.paths import FunctionName, ReadPath, WrittenPath
from hybridflow.config.sections.base import Section
from hybridflow.config.sections.choices import OneOf
from hybridflow.config.sections.engine import EngineSection
from hybridflow.errors import nearest

REWARDS = (
    "gsm8k",
    "gsm8k_flexible",
    "math",
    "math_dapo",
    "multiple_choice",
    "countdown",
    "qa_em",
    "qa_f1",
    "geo3k",
    "json",
    "regex",
    "format",
    "tool_format",
    "code",
)
SPECIAL = ("by_source", "model", "judge")  # routed by data_source; the sections reward.model and reward.judge


def _check_name(name: str) -> str:
    if ".py:" not in name and "://" not in name and name not in (*REWARDS, *SPECIAL):
        raise ValueError(
            f"{name!r} is neither file.py:function, nor the address of a server, nor a built-in reward; "
            f"{nearest(name, (*REWARDS, *SPECIAL))}"
        )
    return name


def _no_object(value: Any) -> Any:
    if callable(value):
        raise ValueError(
            "a configuration is text, and this is a function in memory: write it into a file and name it, as "
            "file.py:function; a program may give it beside the configuration: open_run(config, reward=function)"
        )
    return value


RewardName = Annotated[FunctionName, AfterValidator(_check_name), BeforeValidator(_no_object)]


def _check_worth(value: float) -> float:
    if not abs(value) <= LARGEST_REWARD:
        raise ValueError(f"{value:g} is out of the range of rewards, {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}")
    return value


Worth = Annotated[float, AfterValidator(_check_worth)]


class RewardTermSection(Section):
    """One part of a reward that is a weighted sum."""

    function: RewardName = Field(description="As reward.function.")
    weight: Worth = Field(1.0, description="What it is multiplied with.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="As reward.kwargs.")
    normalize: Literal["none", "group"] = Field(
        "none", description="group: less the mean of the answers to the same prompt, divided by their deviation."
    )
    clip: tuple[Worth, Worth] | None = Field(None, description="Least and greatest value, before the weight.")


class RewardPoolSection(Section):
    """Where reward functions run, and what they may use."""

    processes: int = Field(
        1,
        ge=0,
        description="Processes that score answers beside generation. 0: in this process, one answer after the other, "
        "without limits (a debugger works there).",
    )
    timeout: PositiveFloat = Field(
        60, description="Seconds for one call of the function; its process is then killed, and nothing else is lost."
    )
    memory_mb: PositiveInt = Field(8192, description="Address space of a process in MiB; more is a MemoryError there.")
    concurrency: PositiveInt = Field(
        64, description="Calls in flight at once, of async functions and of servers (all of them together)."
    )
    requests_per_minute: PositiveInt | None = Field(None, description="Most requests to a server; unset: no limit.")
    tokens_per_minute: PositiveInt | None = Field(
        None, description="Most tokens sent to a server, estimated as a quarter of the characters; unset: no limit."
    )
    retries: int = Field(3, ge=0, description="Further attempts where a server does not answer, or says 429 or 5xx.")


class SandboxSection(Section):
    """Where programs run that a model wrote (the reward `code`)."""

    backend: Literal["auto", "local", "bubblewrap", "fusion", "unsafe"] = Field(
        "auto",
        description="local: namespaces, Landlock, seccomp and limits of this Linux kernel; bubblewrap: bwrap besides; "
        "auto: bubblewrap where it is installed, else local; fusion: a Sandbox Fusion server; unsafe: a bare "
        "subprocess, for programs that you trust as your own.",
    )
    url: str | None = Field(None, description="Of the Sandbox Fusion server, such as http://host:8080.")
    seconds: PositiveFloat = Field(10, description="Wall-clock and CPU seconds for a test case.")
    memory_mb: PositiveInt = Field(512, description="Memory of a program in MiB.")
    output_kb: PositiveInt = Field(1024, description="Most output of a program in KiB; it is then ended.")
    parallel: PositiveInt = Field(2, description="Programs that run at once in one reward process.")


class RewardModelSection(Section):
    """A model that scores answers: a sequence classifier with one label."""

    path: ReadPath = Field(description="Its Hugging Face folder or name, with a classification head of one label.")
    template: ReadPath | None = Field(
        None,
        description="Jinja file from messages to the text that it reads; unset: its own tokenizer's chat template.",
    )
    step_separator: str | None = Field(
        None,
        description="Makes it a process reward model: every step of an answer, up to and with this text, is scored "
        "where it ends. Unset: one score for the whole answer.",
    )
    max_tokens: PositiveInt = Field(4096, description="Longest conversation that it reads; a longer one has no score.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="What is multiplied in. auto: bfloat16 on a GPU, float32 on a CPU."
    )
    trust_remote_code: bool = Field(False, description="Run code that the model's folder brings along.")
    engine: EngineSection | None = Field(
        None, description="How it is computed in its pool: what differs from engine; unset: nothing."
    )


JUDGE_ENGINE = "Which engine answers for a judge of this run; vllm and sglang are servers that the run starts."


class VerdictSection(Section):
    """A model that reads a response and writes a verdict, wherever it is."""

    template: ReadPath | None = Field(
        None,
        description="Jinja file from question, response, ground_truth and row to what the judge is asked; unset: "
        "the built-in one, which asks for a grade from 0 to 10.",
    )
    parser: ReadPath | None = Field(
        None,
        description="file.py:function from the verdict's text to a number; unset: the number in the last [[...]] "
        "divided by 10.",
    )
    samples: PositiveInt = Field(1, description="Verdicts for each answer; the reward is their mean.")
    temperature: float = Field(0.0, ge=0, description="Temperature of the judge.")
    max_tokens: PositiveInt = Field(512, description="Longest verdict, in tokens.")

    @property
    def where(self) -> str:
        """The model, or where it is."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("reward.judge.samples above 1 are all the same at temperature 0: set a temperature")
        return self


class ModelJudgeSection(VerdictSection):
    """A judge that a generation engine of this run loads."""

    path: ReadPath = Field(description="A model that a generation engine of this run loads.")
    max_prompt_tokens: PositiveInt = Field(
        3584, description="Longest question to it, with the answer; a longer one has no verdict."
    )

    @property
    def where(self) -> str:
        """See `VerdictSection.where`."""
        return self.path


class InlineJudgeSection(ModelJudgeSection):
    """A judge that the inline engine answers for."""

    engine: Literal["inline"] = Field("inline", description=JUDGE_ENGINE)


class ServerJudgeSection(ModelJudgeSection):
    """A judge behind a server that the run starts."""

    engine: Literal["vllm", "sglang"] = Field(description=JUDGE_ENGINE)
    python: WrittenPath | None = Field(
        None,
        description="The Python of the engine's environment; unset: rollout.python where that is of the same engine, "
        "else this one's.",
    )
    tensor_parallel: PositiveInt = Field(1, description="Devices that share the judge.")
    engine_args: dict[str, int | float | str | bool] = Field(
        default_factory=dict,
        description="Further arguments of vllm or sglang, such as the share of a GPU's memory that the judge may take.",
    )
    start_timeout: PositiveFloat | None = Field(
        None, description="As rollout.start_timeout; unset: as there, where the run's own engine has one, else 600."
    )
    answer_timeout: PositiveFloat | None = Field(
        None, description="As rollout.answer_timeout; unset: as there, where the run's own engine has one, else 600."
    )
    restarts: int | None = Field(
        None, ge=0, description="As rollout.restarts; unset: as there, where the run's own engine has one, else 3."
    )


class EndpointJudgeSection(VerdictSection):
    """A judge behind an endpoint that is there already."""

    url: str = Field(description="Instead of path: an OpenAI-compatible endpoint, such as http://host:8000/v1.")
    model: str | None = Field(None, description="The model's name at the endpoint; unset: the first that it lists.")
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable with the endpoint's key, if any.")

    @property
    def where(self) -> str:
        """See `VerdictSection.where`."""
        return self.url


JudgeSection = Annotated[
    InlineJudgeSection | ServerJudgeSection | EndpointJudgeSection,
    OneOf("url", "engine", what="A model that reads an answer and writes a verdict."),
]


class RewardSection(Section):
    """What a response is worth."""

    function: RewardName = Field(
        "by_source",
        description="by_source: by each row's data_source (docs/rewards.md has the table); the name of a built-in "
        "reward; file.py:function; http://host/path, a server; model or judge: the sections of that name. A function "
        "takes any of response, ground_truth, prompt, row, or data_source, solution_str, ground_truth, extra_info, "
        "and returns a number, or a dict with `score` and further numbers by name; with responses (a list) it scores "
        "all answers to a prompt at once. It may be async.",
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the function.")
    sources: dict[str, RewardName] = Field(
        default_factory=dict, description="Rewards of further data sources, or other ones, for by_source."
    )
    terms: dict[str, RewardTermSection] | None = Field(
        None, description="Instead of function: parts by name, which are added up with their weights."
    )
    on_failure: Literal["fail", "drop_group", "mask", "value"] = Field(
        "fail",
        description="Where a reward raises, takes too long or returns no finite number. fail: the run ends; "
        "drop_group: the prompt's answers are left out; mask: that answer is; value: it gets failure_value. Counted "
        "as reward/failures either way.",
    )
    failure_value: Worth = Field(0.0, description="The reward of a failed answer, for on_failure=value.")
    keep_special_tokens: bool = Field(
        False,
        description="Whether rewards see the special tokens of an answer as text, such as <think> where the tokenizer "
        "has it as one. Those that end an answer they never see.",
    )
    pool: RewardPoolSection = RewardPoolSection()
    sandbox: SandboxSection = SandboxSection()
    model: RewardModelSection | None = Field(None, description="The reward model, for function=model.")
    judge: JudgeSection | None = Field(None, description="The judge, for function=judge.")
    clip: tuple[Worth, Worth] | None = Field(None, description="Least and greatest reward, in training.")
    length_coef: Worth = Field(
        0.0, description="In training, times tokens / rollout.max_response_tokens; negative prefers short answers."
    )
    overlong_buffer: PositiveInt | None = Field(
        None,
        description="In training, the last so many tokens before rollout.max_response_tokens lower the reward step by "
        "step (DAPO's soft punishment); unset: they do not.",
    )
    overlong_penalty: Worth = Field(1.0, gt=0, description="By how much at most.")
    normalize: Literal["none", "step", "running"] = Field(
        "none",
        description="In training, at last: less the mean and divided by the deviation of the step's rewards, or of "
        "all steps' so far.",
    )

    def functions(self) -> list[str]:
        """Returns every reward that is named, with those of by_source that were given."""
        named = [self.function] if self.terms is None else [term.function for term in self.terms.values()]
        return [*named, *(self.sources.values() if "by_source" in named else ())]

    @field_validator("terms")
    @classmethod
    def _check_terms(cls, terms: dict[str, RewardTermSection] | None) -> dict[str, RewardTermSection] | None:
        if terms is not None and not terms:
            raise ValueError("terms is empty: name a part, or give function")
        return terms

    @model_validator(mode="after")
    def _check(self) -> RewardSection:
        if self.terms is not None and (self.function != "by_source" or self.kwargs):
            raise ValueError("reward.terms stands instead of reward.function and reward.kwargs: leave those out")
        named = self.functions()
        for key, section in [("model", self.model), ("judge", self.judge)]:
            if key in named and section is None:
                raise ValueError(f"the reward {key!r} is named, but there is no section reward.{key}")
            if key not in named and section is not None:
                raise ValueError(
                    f"reward.{key} is given, but nothing uses it: set reward.function={key}, or name it in terms"
                )
        if self.sources and "by_source" not in named:
            raise ValueError("reward.sources is for reward.function=by_source")
        if self.failure_value and self.on_failure != "value":
            raise ValueError("reward.failure_value is for reward.on_failure=value")
        for key, bounds in [("clip", self.clip), *((f"terms.{n}.clip", t.clip) for n, t in (self.terms or {}).items())]:
            if bounds is not None and bounds[0] >= bounds[1]:
                raise ValueError(f"reward.{key} is {list(bounds)}: the first number must be below the second")
        if self.sandbox.backend == "fusion" and self.sandbox.url is None:
            raise ValueError("reward.sandbox.backend is fusion, but reward.sandbox.url is not set")
        return self
