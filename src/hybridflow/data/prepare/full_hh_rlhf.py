"""Helpful and harmless dialogues with a preferred and a rejected response. Bai et al. 2022, arXiv 2204.05862.

The ground truth is the preferred response; no rule can score another response, so ``style`` is "model".
"""

from __future__ import annotations

import re

from hybridflow.data.prepare.schema import Published, Split, prepared_row
from hybridflow.data.rows import Row
from hybridflow.errors import UserError

ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def dialogue(text: str) -> list[dict[str, str]]:
    r"""Returns a transcript as chat messages, without the opening of the response that it asks for.

    >>> dialogue("\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Bye.\n\nAssistant:")[1:]
    [{'role': 'assistant', 'content': 'Hello.'}, {'role': 'user', 'content': 'Bye.'}]
    """
    _, *pieces = _TURN.split(text)
    messages = [{"role": ROLES[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2])]
    while messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def convert(row: Row, split: Split, index: int) -> Row:
    """Makes the transcript the prompt, and keeps both responses."""
    messages = dialogue(row["prompt"])
    if not messages:
        raise UserError("no 'Human:' in the prompt")
    return prepared_row(
        "Dahoas/full-hh-rlhf",
        messages,
        ability="alignment",
        ground_truth=row["chosen"].strip(),
        split=split,
        index=index,
        style="model",
        chosen=row["chosen"].strip(),
        rejected=row["rejected"].strip(),
    )


FULL_HH_RLHF = Published(
    "Dahoas/full-hh-rlhf", ("prompt", "chosen", "rejected"), {"train": "train", "test": "test"}, convert
)
