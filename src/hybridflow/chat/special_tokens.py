"""Special tokens in responses: which of them rewards and stop texts see."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

Decode = Callable[[list[int]], str]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Returns the ids of special tokens, by their text."""
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))


def answer_decoder(tokenizer: PreTrainedTokenizerBase, ends: Collection[int], *, keep: bool) -> Decode:
    """Makes the function from the token ids of a response to the text that rewards see.

    Args:
        tokenizer: of the model.
        ends: tokens that end a response by themselves.
        keep: ``reward.keep_special_tokens``.
    """
    frame = {*ends, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}

    def decode(token_ids: list[int]) -> str:
        if not keep:
            return str(tokenizer.decode(token_ids, skip_special_tokens=True))
        return str(tokenizer.decode([i for i in token_ids if i not in frame], skip_special_tokens=False))

    return decode


def reader(tokenizer: PreTrainedTokenizerBase, ends: Collection[int], *, keep: bool) -> Callable[[str], str]:
    """Makes the function from the text of a response to what a reward would see if a model had written it token by
    token.
    """
    names, decode = special_tokens(tokenizer), answer_decoder(tokenizer, ends, keep=keep)

    def read(text: str) -> str:
        if not any(token in text for token in names):
            return text
        return decode(tokenizer(text, add_special_tokens=False).input_ids)

    return read


def stop_decoder(tokenizer: PreTrainedTokenizerBase, stops: Iterable[str | None]) -> Decode:
    """Makes the function from token ids to the text in which stops are searched: with special tokens, where a stop
    names one.

    Args:
        tokenizer: of the model.
        stops: texts and regular expressions.
    """
    keep = bool(list(named_in("\n".join(stop for stop in stops if stop), special_tokens(tokenizer))))

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=not keep))

    return decode


def named_in(text: str, tokens: Iterable[str]) -> Iterator[str]:
    """Yields the tokens whose text stands in this one, which may be a regular expression."""
    return (token for token in tokens if token and (token in text or re.escape(token) in text))
