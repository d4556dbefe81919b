"""The schema of prepared rows, which is verl's, and the description of a data set by its module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hybridflow.data.rows import Row
from hybridflow.errors import UserError

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Published:
    """A published data set.

    Args:
        hub: its name on the Hugging Face hub, with a configuration if it has several.
        columns: what its rows have, as far as `convert` reads it.
        splits: for each file that is written, the split that it is made from.
        convert: called with (row, split, index); gives the prepared row, or None to leave it out.
    """

    hub: str
    columns: tuple[str, ...]
    splits: Mapping[Split, str]
    convert: Callable[[Row, Split, int], Row | None]


@dataclass(frozen=True, slots=True)
class Generated:
    """A data set that is made by a program.

    Args:
        counts: how many rows each file has.
        make: called with (split, count, seed).
    """

    counts: Mapping[Split, int]
    make: Callable[[Split, int, int], list[Row]]


def prepared_row(
    data_source: str,
    prompt: str | list[dict[str, str]],
    *,
    ability: str,
    ground_truth: Any,
    split: Split,
    index: int,
    style: Literal["rule", "model"] = "rule",
    **extra: Any,
) -> Row:
    """Returns a row of the schema.

    Args:
        data_source: name of the data set; metrics are told apart by it.
        prompt: text of the user, or chat messages.
        ability: what the row exercises, such as "math".
        ground_truth: what a reward compares with.
        split: "train" or "test".
        index: number of the row in its source.
        style: whether a rule or a reward model can score a response.
        **extra: kept under ``extra_info``.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {
        "data_source": data_source,
        "prompt": messages,
        "ability": ability,
        "reward_model": {"style": style, "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, **extra},
    }


def text_after(text: str, mark: str) -> str:
    """Returns the text after the last occurrence of a mark.

    Raises:
        UserError: it does not occur.
    """
    _, found, after = text.rpartition(mark)
    if not found:
        raise UserError(f"no {mark!r} in the answer {text[-80:]!r}")
    return after.strip()
