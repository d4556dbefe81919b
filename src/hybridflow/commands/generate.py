"""Generates with a model outside of training: `hybridflow eval` and `hybridflow generate`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hybridflow.chat.messages import RefusedValue
from hybridflow.chat.template import render_prompt
from hybridflow.config.sections.model import ModelSection
from hybridflow.data.reader import ConversationReader
from hybridflow.devices import pick_device
from hybridflow.errors import UserError
from hybridflow.groups.source import require_finite
from hybridflow.models.load import context_of, stop_ids
from hybridflow.models.lora import load_trainable
from hybridflow.noise import NoiseKey
from hybridflow.placing.generation import inline_engine
from hybridflow.protocols.generation import Request, Result, RolloutEngine, Sampling

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

    Raises:
        UserError: the model cannot be loaded, a prompt cannot be rendered or is longer than its context, or the model's
            numbers are not finite.
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
    model.to(pick_device())
    stops, context = stop_ids(model, tokenizer), context_of(model) or math.inf
    reader, requests = ConversationReader(tokenizer), []
    for i, prompt in enumerate(prompts):
        try:
            ids = tuple(render_prompt(tokenizer, reader.prompt(prompt))[1])
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
        requests += [Request(ids, asked, NoiseKey(seed, "generate", i, sample)) for sample in range(samples)]
    for i, result in enumerate(_in_order(inline_engine(model, tokenizer, stop=sampling.stop), requests)):
        require_finite([result.logps], f"prompt {i // samples + 1}", "--temperature")
        text = str(tokenizer.decode(result.token_ids, skip_special_tokens=True))
        yield Answer(prompts[i // samples], i % samples, text, result.finish_reason, len(result.token_ids))


def _in_order(engine: RolloutEngine, requests: Sequence[Request]) -> Iterator[Result]:
    """Yields the results in the order of their requests, each as soon as those before it have arrived."""
    done: dict[int, Result] = {}
    for handle in [engine.submit(request) for request in requests]:
        while handle not in done:
            done.update({result.handle: result for result in engine.wait()})
        yield done.pop(handle)
