"""The value head: the value of a state, computed from the hidden state that the next token is predicted from.

Shapes: M tokens that are scored, D hidden size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.errors import UserError

FILE = "value_head.safetensors"


class ValueHead(torch.nn.Module):
    """One linear layer from a hidden state to a number, in float32 whatever the trunk computes in.

    It begins at zero, so the first values are 0 and do not depend on the scale of the trunk's states.

    Args:
        size: D, the size of the hidden states.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """Maps hidden states ``[M, D]`` to values ``[M]``."""
        with torch.autocast(hidden_MD.device.type, enabled=False):
            return hidden_MD.to(self.weight.dtype) @ self.weight + self.bias


def value_head(model: PreTrainedModel) -> ValueHead:
    """Makes a fresh head that fits the model's hidden states."""
    return ValueHead(model.get_input_embeddings().weight.shape[-1])


def write_value_head(head: ValueHead, folder: Path) -> None:
    """Writes ``value_head.safetensors``."""
    save_file({name: p.detach().cpu().contiguous() for name, p in head.named_parameters()}, folder / FILE)


def read_value_head(head: ValueHead, folder: Path) -> None:
    """Reads what `write_value_head` wrote.

    Raises:
        UserError: there is none, or it is of another size.
    """
    tensors = read_value_tensors(folder)
    if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in head.named_parameters()}:
        raise UserError(
            f"the checkpoint {folder} has no value head of this size",
            fix="give the critic section that the run began with, or another run.folder",
        )
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(tensors[name])


def read_value_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors that `write_value_head` wrote; none where it did not."""
    return load_file(folder / FILE) if (folder / FILE).is_file() else {}
