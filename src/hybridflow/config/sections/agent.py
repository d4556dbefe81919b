"""The section of runs in which the model acts: tools, environments, budgets. Importable without torch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from hybridflow.config.fingerprints import GIVEN
from hybridflow.config.locate import is_function_reference
from hybridflow.config.paths import ReadPath
from hybridflow.config.sections.base import Section

FORMATS = ("hermes",)


class AgentSection(Section):
    """A model that acts: it samples a turn, something answers, it samples the next."""

    tools: list[ReadPath] = Field(
        default_factory=list,
        description="Tools that the model may call: each file.py:function, or file.py:Class, whose methods keep a "
        "state per trajectory.",
    )
    environment: ReadPath | None = Field(
        None,
        description="file.py:Class (or a function that returns an object) with reset, step and close, made for each "
        "trajectory; instead of tools.",
    )
    environment_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments that the environment is made with."
    )
    play: ReadPath | None = Field(
        None,
        description="file.py:function, play(episode, row), `def` or `async def`: a loop of your own; unset: reset, "
        "then sample and step until the environment is done.",
    )
    plays: dict[str, ReadPath] = Field(
        default_factory=dict,
        description="Loops by name: a row whose column agent_name has the name is played with it.",
    )
    format: Literal["hermes"] = Field(
        "hermes", description="How the model writes calls of tools. hermes: <tool_call>{JSON}</tool_call> (Qwen)."
    )
    history: Literal["template", "append", "steps"] = Field(
        "template",
        description="What the model sees of earlier turns. template: what the chat template makes of the conversation, "
        "as in use; a new sequence begins where it rewrites an earlier turn. append: everything as it was. steps: each "
        "turn is a sequence of its own, with the last agent.window turns before it.",
    )
    window: int | None = Field(
        None, ge=0, description="Earlier turns that history=steps shows, beside the system message; unset: all."
    )
    max_turns: PositiveInt = Field(8, description="Most turns of a trajectory.")
    max_turn_tokens: PositiveInt | None = Field(
        None,
        description="Most tokens of a turn; unset: what is left of rollout.max_response_tokens, which counts what the "
        "model samples over all turns (verl's counts observations too).",
    )
    max_observation_tokens: PositiveInt = Field(
        256, description="Most tokens of an answer of a tool, or of an observation; a longer one is cut in its middle."
    )
    max_tokens: PositiveInt | None = Field(
        None,
        description="Most tokens of a sequence behind its prompt, sampled and observed; unset: "
        "rollout.max_response_tokens and max_turns x max_observation_tokens.",
    )
    call_timeout: PositiveFloat = Field(
        30, description="Seconds that a call of a tool, or a step of an environment, may take."
    )
    timeout: PositiveFloat | None = Field(
        None,
        description="Seconds that a trajectory may take; unset: no limit. A run repeats bit for bit only while no "
        "limit in seconds is reached.",
    )
    parallel_calls: PositiveInt = Field(
        8, description="Most calls of one turn that run at the same time, for each trajectory."
    )
    processes: int = Field(
        0,
        ge=0,
        description="Processes that tools and environments run in; one that hangs or dies there costs its trajectory "
        "alone. 0: threads of this process, where a breakpoint works.",
    )
    on_failure: Literal["mask", "fail", "drop_group"] = Field(
        "mask",
        description="What happens to a trajectory that failed for another reason than the model (an environment that "
        "raises, a process that died). mask: it trains nothing; fail: the run ends; drop_group: its group is left "
        "out. The run ends where most of a step failed.",
    )
    tasks: PositiveInt | None = Field(
        None,
        description="Number of tasks that the environment makes by itself, for runs without data.train: a row is "
        "{index: number}, and the seed of reset says the rest.",
    )
    eval_tasks: PositiveInt | None = Field(None, description="The same for evaluation, without data.eval.")

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[str]) -> list[str]:
        for tool in tools:
            if not is_function_reference(tool) and not tool.startswith(GIVEN):
                raise ValueError(f"{tool!r} is no tool: give file.py:function")
        if len(set(tools)) < len(tools):
            raise ValueError("a tool is named twice")
        return tools

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.environment is not None and self.tools:
            raise ValueError("agent has tools and an environment: give one of them; an environment calls its own tools")
        if self.environment is None and not self.tools and self.play is None and not self.plays:
            raise ValueError("agent names nothing that the model acts on: give agent.tools or agent.environment")
        if self.environment is None and (self.environment_kwargs or self.tasks or self.eval_tasks):
            raise ValueError("environment_kwargs, tasks and eval_tasks belong to agent.environment, which is unset")
        if self.window is not None and self.history != "steps":
            raise ValueError(f"agent.window belongs to agent.history=steps, and agent.history is {self.history}")
        return self

    def longest(self, max_response_tokens: int) -> int:
        """Returns the most tokens of a sequence behind its prompt.

        Args:
            max_response_tokens: ``rollout.max_response_tokens``.
        """
        return self.max_tokens or max_response_tokens + self.max_turns * self.max_observation_tokens
