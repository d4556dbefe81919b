"""Generates with a model outside of training: `hybridflow eval` and `hybridflow generate`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.agents.make import load_tools, make_agents
from hybridflow.agents.tools import Toolbox
from hybridflow.chat.fit import require_fit
from hybridflow.chat.messages import Messages, RefusedValue
from hybridflow.chat.special_tokens import answer_decoder
from hybridflow.chat.template import Style, render_prompt
from hybridflow.config.locate import is_function_reference
from hybridflow.config.sections.agent import AgentSection
from hybridflow.config.sections.model import ModelSection
from hybridflow.data.prompts import Prompt
from hybridflow.data.reader import ConversationReader
from hybridflow.devices import pick_device
from hybridflow.errors import UserError
from hybridflow.groups.driving import Driver
from hybridflow.groups.source import require_finite
from hybridflow.models.load import context_of, stop_ids
from hybridflow.models.lora import load_trainable
from hybridflow.noise import NoiseKey
from hybridflow.placing.generation import inline_engine
from hybridflow.protocols.episodes import Start
from hybridflow.protocols.generation import Request, Result, RolloutEngine, Sampling
from hybridflow.protocols.groups import Trajectory
from hybridflow.rollout.inline.engine import InlineEngine

FORMAT = "hermes"  # of calls
DEFAULT_TOKENS = 256  # longest response of `hybridflow generate` in tokens, unless --max-tokens is given


@dataclass(frozen=True, slots=True)
class Answer:
    """A response of `hybridflow generate`.

    Args:
        prompt: the prompt.
        sample: number of the response among those to the prompt.
        response: the text, without special tokens.
        finish_reason: "stop", or "length" where it was cut.
        tokens: its length.
    """

    prompt: str
    sample: int
    response: str
    finish_reason: str
    tokens: int

    def line(self) -> str:
        """Returns the text, with a mark where it was cut."""
        return self.response + ("" if self.finish_reason == "stop" else f"  [cut at {self.tokens} tokens]")


@dataclass(frozen=True, slots=True)
class Acted(Answer):
    """A response with calls of tools; its text is that of the last turn.

    Args:
        messages: the turns of the model and the results of calls, in OpenAI's form.
    """

    messages: Messages

    def line(self) -> str:
        """Returns calls, results and texts, one below the other, with a mark where a budget ended the response."""
        lines = []
        for message in self.messages:
            if message["role"] == "tool":
                lines.append(f"  -> {message['content']}")
                continue
            lines += [text for text in [str(message["content"]).strip()] if text]
            for call in message.get("tool_calls", ()):
                function = call["function"]
                given = (
                    f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in function["arguments"].items()
                )
                lines.append(f"{function['name']}({', '.join(given)})")
        if self.finish_reason not in ("stop", "done"):
            lines.append(f"[ended after {self.tokens} tokens: {self.finish_reason}]")
        return "\n".join(lines)


def ask(
    model_path: str,
    prompts: Sequence[str],
    *,
    max_tokens: int | None,
    sampling: Sampling,
    samples: int,
    seed: int,
    packing: bool = True,
    trust_remote_code: bool = False,
    tools: Sequence[str] = (),
) -> Iterator[Answer]:
    """Yields responses to prompts, in the order of the prompts.

    Args:
        model_path: the model, or a run's folder.
        prompts: the prompts.
        max_tokens: longest response; None is `DEFAULT_TOKENS`, or less in a short context.
        sampling: how to draw; its `max_tokens` and stop tokens are filled in.
        samples: responses to each prompt.
        seed: of the noise.
        packing: see ``model.packing``.
        trust_remote_code: see ``model.trust_remote_code``.
        tools: that the model may call, each file.py:function. A response then ends with a turn that calls none, and
            `max_tokens` counts what the model writes in all its turns.

    Raises:
        UserError: the model cannot be loaded, a tool cannot be used, a prompt cannot be rendered or is longer than its
            context, or the model's numbers are not finite.
    """
    for name, value, low in [
        ("--max-tokens", 1 if max_tokens is None else max_tokens, 1),
        ("--samples", samples, 1),
        ("--temperature", sampling.temperature, 0),
        ("--seed", seed, 0),
    ]:
        if not low <= value < math.inf:
            raise UserError(f"{name} is {value}, it must be at least {low}")
    section = ModelSection(path=model_path, packing=packing, trust_remote_code=trust_remote_code)
    model, tokenizer = load_trainable(section, seed=seed)
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {model_path} has no chat template",
            why="`generate` sends prompts as a user's chat messages, which the template renders",
            fix="score a model that continues plain text with `hybridflow eval` and data.format=text, or set "
            "chat_template in its tokenizer_config.json",
        )
    style = Style(tools=tuple(_tools(tools).schemas))
    require_fit(tokenizer, style, FORMAT)
    model.to(pick_device())
    stops, context = stop_ids(model, tokenizer), context_of(model) or math.inf
    reader, starts = ConversationReader(tokenizer, style), []
    for i, prompt in enumerate(prompts):
        try:
            messages = reader.prompt(prompt)
            text, ids = render_prompt(tokenizer, messages, style)
        except RefusedValue as refused:
            raise UserError(f"prompt {i + 1} {refused}", why=refused.why, fix=refused.fix) from None
        limit = int(min(DEFAULT_TOKENS, context - len(ids))) if max_tokens is None else max_tokens
        if len(ids) + limit > context or limit < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the model's context is {context}",
                why=f"{limit} more do not fit" if limit > 0 else "",
                fix="ask something shorter, or lower --max-tokens",
            )
        asked = replace(sampling, max_tokens=limit, stop_token_ids=stops)
        question = Prompt(tuple(ids), text, messages, None, {}, prompt)
        starts += [Start(NoiseKey(seed, "generate", i, sample), question, asked) for sample in range(samples)]
    engine = inline_engine(model, tokenizer, stop=sampling.stop)
    if tools:
        yield from _act(engine, tokenizer, style, tools, stops, starts)
        return
    requests = [Request(start.question.token_ids, start.sampling, start.key) for start in starts]
    for i, result in enumerate(_in_order(engine, requests)):
        require_finite([result.logps], f"prompt {i // samples + 1}", "--temperature")
        text = str(tokenizer.decode(result.token_ids, skip_special_tokens=True))
        yield Answer(prompts[i // samples], i % samples, text, result.finish_reason, len(result.token_ids))


def _tools(references: Sequence[str]) -> Toolbox:
    for reference in references:
        if not is_function_reference(reference):
            raise UserError(f"--tools {reference} is no tool", fix="give file.py:function, or file.py:Class")
    return load_tools(references)


def _act(
    engine: InlineEngine,
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    tools: Sequence[str],
    stops: Sequence[int],
    starts: Sequence[Start],
) -> Iterator[Acted]:
    """Yields responses with calls of tools, in the order of `starts`, each as soon as those before it have ended."""
    decode = answer_decoder(tokenizer, stops, keep=False)
    agents = make_agents(
        AgentSection(tools=list(tools)), tokenizer, style,
        decode=decode, stops=stops, longest=engine.max_model_len, order="rounds",
    )  # fmt: skip
    driver, done = Driver(engine, agents), dict[int, Trajectory]()
    try:
        for number, start in [(driver.begin(start), start) for start in starts]:
            while number not in done:
                done.update(driver.advance())
            found, draw = done.pop(number), start.key.draw + 1
            if found.failure is not None:
                raise UserError(f"the response to prompt {draw} failed: {found.failure}")
            require_finite([found.logps], f"prompt {draw}", "--temperature")
            behind = found.messages[len(start.question.messages) :]
            yield Acted(
                str(start.question.written), start.key.sample, found.final, found.finish_reason, found.length, behind
            )
    finally:
        driver.stop()
        agents.close()


def _in_order(engine: RolloutEngine, requests: Sequence[Request]) -> Iterator[Result]:
    """Yields the results in the order of their requests, each as soon as those before it have arrived."""
    done: dict[int, Result] = {}
    for handle in [engine.submit(request) for request in requests]:
        while handle not in done:
            done.update({result.handle: result for result in engine.wait()})
        yield done.pop(handle)
