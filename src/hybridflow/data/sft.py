"""Conversations to packed training batches, with loss on the assistant's tokens."""

from __future__ import annotations

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.batch import Batch
from hybridflow.config.sections import SftDataSection
from hybridflow.data.chat import render_conversations, require_template
from hybridflow.data.rows import Row, column, fingerprint_rows, read_rows
from hybridflow.errors import UserError


class SftSet:
    """Conversations of a data source; batches are rendered when they are asked for.

    Args:
        rows: the rows.
        source: where they came from, for messages.
        config: which column, which limit.
        tokenizer: renders and tokenises.
    """

    def __init__(
        self, rows: list[Row], source: str, config: SftDataSection, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.rows, self.source, self.config, self.tokenizer = rows, source, config, tokenizer
        self.fingerprint = fingerprint_rows(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: list[int]) -> Batch:
        """``input_ids_T``, ``loss_mask_T`` (bool) and ``trajectory_B`` of these rows.

        Raises:
            UserError: a row has no conversation, no answer in it, or is over the limit.
        """
        conversations = [column(self.rows[i], self.config.messages_key, source=self.source, index=i) for i in indices]
        for i, messages in zip(indices, conversations):
            roles = [m.get("role") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
            if "assistant" not in roles:
                raise UserError(
                    f"{self.config.messages_key} of row {i} of {self.source} holds no assistant message",
                    why="there is nothing to learn from",
                    fix="give a list of {role, content} objects with at least one role 'assistant'",
                )
        rendered = render_conversations(self.tokenizer, conversations)
        for i, (ids, _) in zip(indices, rendered):
            if len(ids) > self.config.max_tokens:
                raise UserError(
                    f"row {i} of {self.source} has {len(ids)} tokens, data.max_tokens is {self.config.max_tokens}",
                    fix="raise the limit or leave the row out",
                )
        return Batch.from_rows(
            {
                "input_ids_T": [ids for ids, _ in rendered],
                "loss_mask_T": [mask for _, mask in rendered],
                "trajectory_B": indices,
            }
        )


def load_sft(config: SftDataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> SftSet:
    """Reads the training conversations.

    Raises:
        UserError: the source cannot be read, or the tokenizer has no chat template.
    """
    require_template(tokenizer)
    return SftSet(read_rows(config.train, seed=seed), config.train, config, tokenizer)
