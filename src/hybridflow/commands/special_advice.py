"""Special tokens in responses: what rewards and stops read of them, and the advice of `check` about them.

A tokenizer that makes <think> or </answer> one special token leaves it out of decoded text. Rewards then see no such
tag, unless ``reward.keep_special_tokens`` is true; they never see the tokens that end a response.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.chat.messages import Messages
from hybridflow.chat.special_tokens import named_in, special_tokens
from hybridflow.chat.template import Style, conversation_text, prompt_text, tokenize
from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.rl import RlConfig
from hybridflow.config.sections.rewards import RewardSection
from hybridflow.data.prompts import Prompt
from hybridflow.errors import UserError
from hybridflow.models.load import stop_ids
from hybridflow.rewards.graders.routing import route
from hybridflow.rewards.verifiable.registry import REWARDS

ASKED: Messages = [{"role": "user", "content": "1"}]
TAGS = ("think", "answer")  # of the reward `format`, where none are given


def advice_on_tokens(
    config: RlConfig | EvalConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, first: Prompt
) -> Iterator[str]:
    """Yields advice where rewards look for tokens that they do not see, where responses cannot end, and where the
    template begins them.

    Args:
        config: the configuration.
        model: the model, or its outline.
        tokenizer: its tokenizer.
        first: a prompt.
    """
    r, ends = config.reward, stop_ids(model, tokenizer)
    style = Style(config.data.format, config.data.system_prompt, config.data.thinking)
    frame = {*ends, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    turns = _conversation(tokenizer, style)
    tags = [
        token
        for token, i in special_tokens(tokenizer).items()
        if i not in frame and (token not in turns or re.fullmatch(r"</?\w+>", token))  # what opens turns is no tag
    ]
    truth = first.ground_truth if isinstance(first.ground_truth, str) else ""
    read = "\n".join([*_what_rewards_look_for(r, first.row.get("data_source")), truth])
    unseen = sorted(named_in(read, tags))
    if unseen and not r.keep_special_tokens:
        yield (
            f"{', '.join(unseen)}: special tokens of this tokenizer, which the reward looks for and does not see in "
            "responses; set reward.keep_special_tokens=true"
        )
    if style.format == "text":
        return
    yield from advice_on_ends(model, tokenizer, style)
    opened = re.search(r"<(\w+)>\s*$", first.text)
    if opened is not None:
        mark = f"<{opened[1]}>"
        wanted = [kwargs for kwargs in _format_kwargs(r) if opened[1] in kwargs.get("tags", TAGS)]
        if any(kwargs.get("opened") != mark for kwargs in wanted) or (not wanted and mark in read):
            key = f"kwargs.opened={mark}" if wanted else "a reward that begins with what the template wrote"
            yield (
                f"the template begins every response with {mark}, so the response itself, which the reward sees, has "
                f"none; give the reward {key}"
            )


def advice_on_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, style: Style) -> Iterator[str]:
    """Yields advice where the chat template closes a response with another token than the one that ends it in
    generation.
    """
    whole = _conversation(tokenizer, style)
    if not whole:
        return
    before = prompt_text(tokenizer, ASKED, style)
    ends = stop_ids(model, tokenizer)
    [ids] = tokenize(tokenizer, [whole[len(before) :] if whole.startswith(before) else whole], style)
    closing = [i for i in ids if i in special_tokens(tokenizer).values()]
    if not set(ids) & set(ends):
        by = f"with {tokenizer.decode([closing[-1]])!r}" if closing else "with no special token"
        first = tokenizer.decode([closing[-1]]) if closing else tokenizer.eos_token
        yield (
            f"the chat template closes a response {by}, and responses end at {_texts(tokenizer, ends)}: a model that "
            f"is trained on this template does not learn to stop; "
            + (
                f"set eos_token to {first!r} in tokenizer_config.json, or add it to eos_token_id in "
                "generation_config.json"
                if closing
                else f"have the template write {first!r} after a response"
            )
        )


def _conversation(tokenizer: PreTrainedTokenizerBase, style: Style) -> str:
    """Renders a question and its response; "" where there is no template, or one that asks for other messages."""
    if style.format == "text":
        return ""
    with suppress(UserError):
        return conversation_text(tokenizer, [*ASKED, {"role": "assistant", "content": "1"}], style)
    return ""


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    return " or ".join(repr(str(tokenizer.decode([i]))) for i in ids)


def _what_rewards_look_for(r: RewardSection, source: str | None) -> Iterator[str]:
    """Yields the texts that would name a reward's tags: its arguments, and its source."""
    yield str([r.kwargs, *(term.kwargs for term in (r.terms or {}).values())])
    for kwargs in _format_kwargs(r):
        yield " ".join(f"<{tag}> </{tag}>" for tag in kwargs.get("tags", TAGS))
    for name in r.functions():
        known = route(source, r.sources) if name == "by_source" else name
        if known in REWARDS:
            code = importlib.util.find_spec(REWARDS[known].partition(":")[0])
            file = "" if code is None or code.origin is None or known == "format" else code.origin
        else:
            file = known.rpartition(":")[0]
        if file.endswith(".py") and Path(file).is_file():
            yield Path(file).read_text(encoding="utf-8", errors="replace")


def _format_kwargs(r: RewardSection) -> list[dict[str, Any]]:
    parts = [(r.function, r.kwargs)] if r.terms is None else [(t.function, t.kwargs) for t in r.terms.values()]
    return [kwargs for name, kwargs in parts if name == "format"]
