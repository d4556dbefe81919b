"""The agents of a configuration: tools and environments are loaded, and the maker of trajectories is put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.agents.environments import RemoteEnvironment, environment_maker
from hybridflow.agents.episode import Language
from hybridflow.agents.given import NOTHING, Given, find, shown
from hybridflow.agents.play import Play, loop_of, play
from hybridflow.agents.processes import HostPool
from hybridflow.agents.runner import Agents
from hybridflow.agents.tools import Toolbox, ToolSet, in_processes, toolbox
from hybridflow.agents.world import WorldMaker
from hybridflow.chat.bridge import Bridge
from hybridflow.chat.special_tokens import special_tokens
from hybridflow.chat.template import Style
from hybridflow.chat.tool_calls import FORMATS
from hybridflow.config.sections.agent import AgentSection
from hybridflow.errors import UserError, nearest
from hybridflow.protocols.calls import CallStore


def make_agents(
    section: AgentSection,
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    *,
    decode: Callable[[list[int]], str],
    stops: Sequence[int],
    longest: int,
    order: Literal["rounds", "free"],
    given: Given = NOTHING,
    calls: CallStore | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Agents:
    """Makes the maker of trajectories in which a model acts.

    Args:
        section: the ``agent`` section.
        tokenizer: of the model.
        style: how conversations become text, with the tools of the configuration.
        decode: token ids to the text that rewards see.
        stops: the tokens that close a turn.
        longest: most tokens of a sequence, its prompt included.
        order: see `Rollouts.order`.
        given: objects that a program gave, see `name_objects`.
        calls: keeps answers of tools.
        tell: takes the traceback of the first failure of each kind.

    Raises:
        UserError: a tool, an environment or a loop cannot be loaded or used.
    """
    tools = load_tools(section.tools, given)
    bridge = Bridge(
        tokenizer,
        style,
        history="append" if section.history == "append" else "template",
    )
    ends = tuple(str(tokenizer.decode([i], skip_special_tokens=False)) for i in stops)

    def decode_all(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=False))

    pool = HostPool(section.processes, section.call_timeout) if section.processes else None
    language = Language(
        bridge, FORMATS[section.format], decode, decode_all, ends, longest, tuple(special_tokens(tokenizer))
    )
    return Agents(
        section,
        language,
        world_maker(section, tools, pool, given),
        loops(section, given),
        order=order,
        calls=calls,
        tell=tell,
        pool=pool,
    )


def load_tools(references: Sequence[str], given: Given = NOTHING) -> Toolbox:
    """Loads the tools of a configuration.

    Raises:
        UserError: a file or function is not there, cannot be described, or two tools have one name.
    """
    return toolbox([(shown(reference), find(reference, given)) for reference in references])


def world_maker(
    section: AgentSection, tools: Toolbox, pool: HostPool | None = None, given: Given = NOTHING
) -> WorldMaker:
    """Returns the function that makes the environment of a trajectory.

    Args:
        section: the ``agent`` section.
        tools: its tools.
        pool: the processes that they run in; None: this one.
        given: objects that a program gave, see `name_objects`.

    Raises:
        UserError: the environment cannot be loaded or used.
    """
    if section.environment is None:
        box = tools if pool is None else in_processes(tools, section.tools, pool)
        return lambda calls: ToolSet(box, calls)
    found = find(section.environment, given)
    make = environment_maker(shown(section.environment), found, section.environment_kwargs)
    if pool is not None:
        reference, kwargs = section.environment, section.environment_kwargs
        return lambda calls: RemoteEnvironment(pool.object(reference, kwargs))
    return lambda calls: make()


def loops(section: AgentSection, given: Given = NOTHING) -> Callable[[dict[str, Any]], Play]:
    """Returns the function that chooses the loop of a row."""
    usual = play if section.play is None else loop_of(find(section.play, given), shown(section.play))
    named = {name: loop_of(find(ref, given), shown(ref)) for name, ref in section.plays.items()}

    def of_row(row: dict[str, Any]) -> Play:
        name = row.get("agent_name")
        if name is None or not named:
            return usual
        if name not in named:
            raise UserError(
                f"a row has the agent_name {name!r}; {nearest(str(name), named)}", fix="name it in agent.plays"
            )
        return named[name]

    return of_row
