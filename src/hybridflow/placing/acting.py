"""The prompts of a configuration and the maker of its trajectories, with tools or an environment where it has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.agents.given import NOTHING, Given
from hybridflow.agents.make import load_tools, make_agents
from hybridflow.chat.fit import require_fit
from hybridflow.chat.special_tokens import answer_decoder
from hybridflow.chat.template import Style
from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.sections.data import SourceSection
from hybridflow.data.prompts import PromptSet, environment_tasks, load_prompts
from hybridflow.groups.single_turn import SingleTurn
from hybridflow.protocols.calls import CallStore
from hybridflow.protocols.episodes import Rollouts
from hybridflow.protocols.generation import RolloutEngine


def prompts_of(
    config: RlConfig | EvalConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[SourceSection] | None,
    tasks: int | None,
    given: Given = NOTHING,
) -> PromptSet | None:
    """Loads rows to train or to evaluate on; None where there are none.

    Args:
        config: its ``data`` and ``agent`` sections.
        tokenizer: renders prompts.
        sources: of the rows.
        tasks: without sources, the number of tasks that the environment makes by itself.
        given: objects that a program gave, see `name_objects`.

    Raises:
        UserError: rows or tools cannot be used.
    """
    agent, d = config.agent, config.data
    schemas = load_tools(agent.tools, given).schemas if agent is not None else []
    if agent is not None:
        style = Style(d.format, d.system_prompt, d.thinking, tuple(schemas))
        require_fit(tokenizer, style, agent.format)
    if sources is None:
        return None if tasks is None else environment_tasks(tasks, d, tokenizer)
    made_later = agent is not None and agent.environment is not None
    return load_prompts(sources, d, tokenizer, seed=config.run.seed, tools=schemas, made_later=made_later)


def make_rollouts(
    config: RlConfig | EvalConfig,
    tokenizer: PreTrainedTokenizerBase,
    engine: RolloutEngine,
    stops: Sequence[int],
    prompts: PromptSet,
    *,
    given: Given = NOTHING,
    calls: CallStore | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Rollouts:
    """Makes what makes trajectories: responses to prompts, or a model that acts.

    Args:
        config: its ``agent``, ``rollout`` and ``reward`` sections.
        tokenizer: of the model.
        engine: that generates.
        stops: the tokens that end a turn.
        prompts: rows of the run; their style is that of all conversations.
        given: objects that a program gave, see `name_objects`.
        calls: keeps answers of tools.
        tell: takes the traceback of a failed trajectory.

    Raises:
        UserError: a tool, an environment or a loop cannot be used.
    """
    decode = answer_decoder(tokenizer, stops, keep=config.reward.keep_special_tokens)
    if config.agent is None:
        return SingleTurn(decode)
    # A sequence that begins with a whole conversation, after a fork or as a step, has no more room than the first one.
    longest = config.data.max_prompt_tokens + config.agent.longest(config.rollout.max_response_tokens)
    return make_agents(
        config.agent,
        tokenizer,
        prompts.style,
        decode=decode,
        stops=stops,
        longest=min(engine.max_model_len, longest),
        order="rounds" if config.rollout.engine == "inline" else "free",
        given=given,
        calls=calls,
        tell=tell,
    )
