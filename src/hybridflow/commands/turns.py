"""What `hybridflow check` says of a run's conversations: which kinds of turn are appended to, and which fork."""

from __future__ import annotations

from collections.abc import Iterator

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.agents.given import NOTHING, Given
from hybridflow.agents.make import load_tools
from hybridflow.chat.bridge import History
from hybridflow.chat.certificate import TurnFinding, certificate
from hybridflow.chat.fit import require_fit
from hybridflow.chat.template import Style
from hybridflow.chat.tool_calls import FORMATS
from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.rl import RlConfig


def describe_turns(
    config: RlConfig | EvalConfig, tokenizer: PreTrainedTokenizerBase, given: Given = NOTHING
) -> Iterator[str]:
    """Yields lines about the turns of agents; none for runs without a section agent.

    Raises:
        UserError: the chat template and the tools or the format of their calls do not fit.
    """
    agent, d = config.agent, config.data
    if agent is None:
        return
    style = Style(d.format, d.system_prompt, d.thinking, tuple(load_tools(agent.tools, given).schemas))
    require_fit(tokenizer, style, agent.format)
    if agent.history == "steps":
        yield "turns: each is a sequence of its own (agent.history=steps)"
        return
    history: History = "append" if agent.history == "append" else "template"
    found = certificate(tokenizer, style, FORMATS[agent.format], history=history)
    yield f"turns: what the chat template does after each kind of turn (agent.history={agent.history})"
    yield from (f"  {line.line()}" for line in found)
    if history == "template" and any(_is_cycle(line) and line.outcome == "forks" for line in found):
        yield (
            "  advice: a new sequence begins after each call, and its whole prompt is read again; agent.history=append "
            "keeps one sequence, which the model is not shown in use"
        )


def _is_cycle(finding: TurnFinding) -> bool:
    return finding.kind in ("a call, then its result", "a second call")
