"""The section that describes how responses are scored, and the names of the built-in rewards. Importable without torch.

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
from hybridflow.config.fingerprints import GIVEN
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
    "environment",
)
SPECIAL = ("by_source", "model", "judge")  # routed by data_source; the sections reward.model and reward.judge


def _check_name(name: str) -> str:
    if name.startswith(GIVEN):
        raise ValueError(
            f"{name} is a function that a program gave to this run, and a configuration cannot hold it: run that "
            "program again, or name a reward, such as file.py:function"
        )
    if ".py:" not in name and "://" not in name and name not in (*REWARDS, *SPECIAL):
        model = f"if it is a model that scores, set reward.function=model and reward.model.path={name}"
        raise ValueError(
            f"{name!r} is neither file.py:function, nor the address of a server, nor a built-in reward; "
            f"{model if '/' in name else nearest(name, (*REWARDS, *SPECIAL))}"
        )
    return name


def _no_object(value: Any) -> Any:
    if callable(value):
        raise ValueError(
            "a configuration is text, and this is a function in memory: write it into a file and name it, as "
            "file.py:function; a program may give it as an object: hybridflow.open_run(config, reward=function)"
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
    weight: Worth = Field(1.0, description="Factor of this part in the sum.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="As reward.kwargs.")
    normalize: Literal["none", "group"] = Field(
        "none",
        description="group: subtract the mean over the responses to the same prompt, and divide by their "
        "standard deviation.",
    )
    clip: tuple[Worth, Worth] | None = Field(
        None, description="Least and greatest value, before it is multiplied by the weight."
    )


class RewardPoolSection(Section):
    """Where reward functions run, and their limits."""

    processes: int = Field(
        1,
        ge=0,
        description="Number of processes that score responses during generation. 0: score in this process, one "
        "response after the other, without limits (a debugger works there).",
    )
    timeout: PositiveFloat = Field(
        60,
        description="Longest time of one call of the function, in seconds; its process is then killed, and only that "
        "call fails.",
    )
    memory_mb: PositiveInt = Field(
        8192, description="Largest address space of a reward process, in MiB; beyond it a call gets a MemoryError."
    )
    concurrency: PositiveInt = Field(
        64, description="Most calls in flight at once, to async functions and to servers together."
    )
    requests_per_minute: PositiveInt | None = Field(
        None, description="Most requests per minute to a server; unset: no limit."
    )
    tokens_per_minute: PositiveInt | None = Field(
        None,
        description="Most tokens per minute sent to a server, estimated as a quarter of the characters; unset: no "
        "limit.",
    )
    retries: int = Field(
        3, ge=0, description="Further attempts where a server does not answer, or answers with HTTP status 429 or 5xx."
    )


class SandboxSection(Section):
    """Where programs run that the policy wrote (for the reward `code`)."""

    backend: Literal["auto", "local", "bubblewrap", "fusion", "unsafe"] = Field(
        "auto",
        description="local: namespaces, Landlock, seccomp and limits of this Linux kernel; bubblewrap: the same with "
        "bwrap; auto: bubblewrap where it is installed, else local; fusion: a Sandbox Fusion server; "
        "unsafe: a subprocess without a sandbox, only for programs that you trust as your own.",
    )
    url: str | None = Field(None, description="URL of the Sandbox Fusion server, such as http://host:8080.")
    seconds: PositiveFloat = Field(
        10, description="Limit for a test case, in seconds of wall-clock time and of CPU time."
    )
    memory_mb: PositiveInt = Field(512, description="Most memory of a program, in MiB.")
    output_kb: PositiveInt = Field(
        1024, description="Most output of a program, in KiB; beyond it the program is ended."
    )
    parallel: PositiveInt = Field(2, description="Most programs that run at once in one reward process.")


class RewardModelSection(Section):
    """A model that scores responses: a sequence classifier with one label."""

    path: ReadPath = Field(
        description="Hugging Face folder or name of the reward model, a sequence classifier with one label."
    )
    template: ReadPath | None = Field(
        None,
        description="Jinja file that renders messages to the text that the model reads; unset: the chat template of "
        "its tokenizer.",
    )
    step_separator: str | None = Field(
        None,
        description="Text that ends a step of a response. Makes the model a process reward model: it scores every "
        "step at the step's end. Unset: one score for the whole response.",
    )
    max_tokens: PositiveInt = Field(
        4096,
        description="Longest conversation that the model scores, in tokens; a longer one has no score, and is a "
        "failure.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Data type of matrix products. auto: bfloat16 on a GPU, float32 on a CPU."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Set it only for code that you have read."
    )
    engine: EngineSection | None = Field(
        None, description="How it is computed in its pool: what differs from engine; unset: nothing."
    )


JUDGE_ENGINE = (
    "Engine that generates the verdicts of a judge given by path. inline: in this process; vllm, "
    "sglang: servers that the run starts."
)


class VerdictSection(Section):
    """A model that reads a response and writes a verdict, wherever it is."""

    template: ReadPath | None = Field(
        None,
        description="Jinja file that renders question, response, ground_truth and row to the judge's prompt; unset: "
        "the built-in one, which asks for a grade from 0 to 10.",
    )
    parser: ReadPath | None = Field(
        None,
        description="file.py:function that turns the verdict's text into a number; unset: the number in the last "
        "[[...]] divided by 10.",
    )
    samples: PositiveInt = Field(1, description="Number of verdicts for each response; the reward is their mean.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature of the judge; 0: greedy.")
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

    path: ReadPath = Field(description="Model of the judge, in the form of model.path; an engine of this run loads it.")
    max_prompt_tokens: PositiveInt = Field(
        3584,
        description="Longest prompt of the judge, response included, in tokens; a longer one has no verdict, and is a "
        "failure.",
    )

    @property
    def where(self) -> str:
        """See `VerdictSection.where`."""
        return self.path


class InlineJudgeSection(ModelJudgeSection):
    """A judge whose verdicts the inline engine generates."""

    engine: Literal["inline"] = Field("inline", description=JUDGE_ENGINE)


class ServerJudgeSection(ModelJudgeSection):
    """A judge behind a server that the run starts."""

    engine: Literal["vllm", "sglang"] = Field(description=JUDGE_ENGINE)
    python: WrittenPath | None = Field(
        None,
        description="Python interpreter of the engine's environment; unset: rollout.python if that is for the same "
        "engine, else this interpreter.",
    )
    tensor_parallel: PositiveInt = Field(1, description="Number of devices that share the judge.")
    engine_args: dict[str, int | float | str | bool] = Field(
        default_factory=dict,
        description="Further arguments of vllm or sglang, such as the share of a GPU's memory that the judge may use.",
    )
    start_timeout: PositiveFloat | None = Field(
        None,
        description="Seconds that the judge's engine may take to start; unset: rollout.start_timeout if the run's "
        "engine has it, else 600.",
    )
    answer_timeout: PositiveFloat | None = Field(
        None,
        description="Seconds of silence after which the judge's engine counts as hung; unset: rollout.answer_timeout "
        "if the run's engine has it, else 600.",
    )
    restarts: int | None = Field(
        None,
        ge=0,
        description="How often the judge's engine is started again; unset: rollout.restarts if the run's engine has "
        "it, else 3.",
    )


class EndpointJudgeSection(VerdictSection):
    """A judge behind an endpoint that runs already."""

    url: str = Field(description="An OpenAI-compatible endpoint, such as http://host:8000/v1, instead of path.")
    model: str | None = Field(None, description="Name of the model at the endpoint; unset: the first that it lists.")
    api_key_env: str = Field(
        "OPENAI_API_KEY",
        description="Environment variable with the endpoint's API key; it may be unset where the endpoint needs none.",
    )

    @property
    def where(self) -> str:
        """See `VerdictSection.where`."""
        return self.url


JudgeSection = Annotated[
    InlineJudgeSection | ServerJudgeSection | EndpointJudgeSection,
    OneOf("url", "engine", what="A model that reads a response and writes a verdict."),
]


class RewardSection(Section):
    """How responses are scored."""

    function: RewardName = Field(
        "by_source",
        description="What scores responses. by_source: the built-in reward for each row's data_source "
        "(docs/rewards.md has the table); the name of a built-in reward; file.py:function; "
        "http://host/path, a server; model or judge: the sections of that name. A function takes any of "
        "response, ground_truth, prompt, row, or data_source, solution_str, ground_truth, extra_info, and "
        "returns a number, or a dict with `score` and further numbers by name; with responses (a list) it "
        "scores all responses to a prompt at once. It may be async.",
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Further keyword arguments of the function.")
    sources: dict[str, RewardName] = Field(
        default_factory=dict,
        description="For by_source: the reward of a data source, by its name. Adds to the built-in table, and wins "
        "over it.",
    )
    terms: dict[str, RewardTermSection] | None = Field(
        None, description="Instead of function: the parts of the reward by name; their weighted sum is the reward."
    )
    on_failure: Literal["fail", "drop_group", "mask", "value"] = Field(
        "fail",
        description="What happens where a reward raises, takes too long or returns no finite number. fail: the run "
        "ends; drop_group: all responses to the prompt are left out; mask: the response is left out; "
        "value: it gets failure_value. The metric reward/failures counts such responses.",
    )
    failure_value: Worth = Field(
        0.0, description="The reward of a response that the reward failed on, for on_failure=value."
    )
    keep_special_tokens: bool = Field(
        False,
        description="Show rewards the special tokens of a response as text, such as <think> where that is one token. "
        "The tokens that end a response are never shown.",
    )
    pool: RewardPoolSection = RewardPoolSection()
    sandbox: SandboxSection = SandboxSection()
    model: RewardModelSection | None = Field(None, description="The reward model, for function=model.")
    judge: JudgeSection | None = Field(None, description="The judge, for function=judge.")
    clip: tuple[Worth, Worth] | None = Field(
        None,
        description="Least and greatest reward in training; rewards outside are set to the nearer bound. unset: no "
        "bounds.",
    )
    length_coef: Worth = Field(
        0.0,
        description="In training, this times (response tokens / rollout.max_response_tokens) is added to the reward; "
        "a negative value prefers short responses.",
    )
    overlong_buffer: PositiveInt | None = Field(
        None,
        description="In training, a response that ends within this many tokens of rollout.max_response_tokens loses "
        "reward, linearly in its length (DAPO's soft overlong punishment); unset: no such penalty.",
    )
    overlong_penalty: Worth = Field(
        1.0,
        gt=0,
        description="Largest penalty of reward.overlong_buffer: that of a response of rollout.max_response_tokens.",
    )
    normalize: Literal["none", "step", "running"] = Field(
        "none",
        description="In training, after all other changes: subtract the mean of the rewards and divide by their "
        "standard deviation. step: of this step's rewards; running: of all steps' so far; none: leave "
        "rewards as they are.",
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
            raise ValueError("reward.terms takes the place of reward.function and reward.kwargs: leave those out")
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
