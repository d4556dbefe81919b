"""A language model that is a table: an embedding of tokens and places, and an output layer. For tests by the hundred.

It goes through the same packing, sharing of prompts and scoring as any other model, at a thousandth of the cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from hybridflow.models.families import use_packing

WORDS = 12
PLACES = 48


class LinearConfig(PreTrainedConfig):
    """The sizes of a `LinearModel`."""

    model_type = "linear_test_model"

    def __init__(self, vocab_size: int = WORDS, hidden_size: int = 4, **values: Any) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**values)


class Trunk(torch.nn.Module):
    """The state of a token: its embedding plus that of its place."""

    def __init__(self, config: LinearConfig) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = torch.nn.Embedding(PLACES, config.hidden_size)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> BaseModelOutput:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return BaseModelOutput(last_hidden_state=self.words(input_ids) + self.places(position_ids))


class LinearModel(PreTrainedModel):
    """Logits are a linear function of the token before and of its place."""

    config_class = LinearConfig
    base_model_prefix = "trunk"
    _supports_attention_backend = True

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        self.trunk = Trunk(config)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **values: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.trunk(input_ids, **values).last_hidden_state))


def linear_model(*, packing: bool = True, seed: int = 0) -> LinearModel:
    """A model of random weights in float64; without packing its sequences are padded, and share no prompts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LinearModel(LinearConfig()).to(torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
    if packing:
        use_packing(model)
    return model
