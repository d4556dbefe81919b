"""Checks of runs in which the model acts: its tools, its loops, its environment, and room for a turn."""

from __future__ import annotations

import json
from collections.abc import Iterator

from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.agents.episode import environment_seed
from hybridflow.agents.given import NOTHING, Given, shown
from hybridflow.agents.make import load_tools, loops, world_maker
from hybridflow.agents.processes import HostPool
from hybridflow.agents.trial import try_environment
from hybridflow.chat.template import render_prompt
from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.data.prompts import PromptSet
from hybridflow.errors import UserError
from hybridflow.noise import NoiseKey
from hybridflow.protocols.episodes import Start
from hybridflow.protocols.generation import Sampling
from hybridflow.rollout.inline.engine import require_room

TASKS = 4  # whose beginnings are compared


def describe_tools(config: RlConfig | EvalConfig, given: Given = NOTHING) -> Iterator[str]:
    """Loads tools and loops, and yields what the model is shown of each tool.

    Raises:
        UserError: one of them cannot be loaded or used.
    """
    agent = config.agent
    if agent is None:
        return
    box = load_tools(agent.tools, given)
    for schema in box.schemas:
        yield f"tool {json.dumps(schema['function'], ensure_ascii=False)}"
    loops(agent, given)
    for key, reference in [("agent.play", agent.play), *((f"agent.plays.{k}", v) for k, v in agent.plays.items())]:
        if reference is not None:
            yield f"loop {key} {shown(reference)}: found"


def turn_tokens(config: RlConfig | EvalConfig) -> int:
    """Returns the most tokens of one turn."""
    limit, agent = config.rollout.max_response_tokens, config.agent
    return limit if agent is None else min(limit, agent.max_turn_tokens or limit)


def check_environment(
    config: RlConfig | EvalConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    given: Given = NOTHING,
) -> Iterator[str]:
    """Plays the environment of a run without the model, and checks the prompts that it makes.

    Raises:
        UserError: it cannot be loaded, raises, begins differently under one seed, or leaves no room for a turn.
    """
    agent = config.agent
    if agent is None or agent.environment is None:
        return
    name = shown(agent.environment)
    world = "environment" if isinstance(config, RlConfig) else "environment/eval"
    count = min(TASKS, len(prompts))
    questions = [prompts[i] for i in range(count)]
    sampling = Sampling(max_tokens=config.rollout.max_response_tokens)
    starts = [Start(NoiseKey(config.run.seed, "train", i, 0), q, sampling, world) for i, q in enumerate(questions)]
    pool = HostPool(1, agent.call_timeout) if agent.processes else None
    begun = yield from try_environment(
        name,
        world_maker(agent, load_tools(agent.tools, given), pool, given),
        agent,
        [question.row for question in questions],
        [environment_seed(start) for start in starts],
        pool=pool,
    )
    limit = config.data.max_prompt_tokens
    for observation in begun:
        text, ids = render_prompt(tokenizer, observation.messages, prompts.style)
        if len(ids) > limit:
            raise UserError(
                f"the environment {name} begins with a prompt of {len(ids)} tokens, and "
                f"data.max_prompt_tokens is {limit}: {text[:80]!r}",
                fix="raise the limit, or shorten what reset returns",
            )
        if config.rollout.engine == "inline":
            require_room(model, len(ids), turn_tokens(config), config.rollout.max_cache_tokens)
