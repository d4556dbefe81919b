"""Sequence classifiers with one label: reward models. A trunk, and one linear layer that reads a state as a number.

Transformers reads the state of the last token that is not the padding token: see `padding_of`.

Shapes: M tokens whose state is read, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from hybridflow.config.locate import is_function_reference
from hybridflow.errors import UserError
from hybridflow.models.attention import ATTENTION
from hybridflow.models.families import KNOWN
from hybridflow.models.load import (
    causal_config,
    from_folder,
    from_function,
    load_tokenizer,
    refuse_both_directions,
    remove_dropout,
)
from hybridflow.models.source import code_files, model_folder, read_config, refuse_own_code

HEAD = "score"  # the layer's name in every decoder of transformers
ENDING = "ForSequenceClassification"


class StateReader:
    """The function that `engines.scoring` calls for values: a classifier's own layer, always in float32.

    Args:
        layer: ``[1, D]`` weights; they stay the model's.
    """

    def __init__(self, layer: torch.nn.Linear) -> None:
        self.layer = layer

    def __call__(self, hidden_MD: Tensor) -> Tensor:
        """Maps hidden states ``[M, D]`` to values ``[M]``."""
        dtype = torch.promote_types(torch.float32, self.layer.weight.dtype)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            return torch.nn.functional.linear(hidden_MD.to(dtype), self.layer.weight.to(dtype))[:, 0]


def state_reader(model: PreTrainedModel) -> StateReader | None:
    """Returns the reader of values from a classifier's last hidden states; None for a model of another kind."""
    layer = getattr(model, HEAD, None) if is_classifier(type(model).__name__) else None
    return StateReader(layer) if isinstance(layer, torch.nn.Linear) else None


def is_classifier(architecture: str) -> bool:
    """Returns whether a class of transformers classifies sequences.

    >>> is_classifier("Qwen3ForSequenceClassification"), is_classifier("Qwen3ForCausalLM")
    (True, False)
    """
    return architecture.endswith(ENDING)


def holds_classifier(folder: Path) -> bool:
    """Returns whether the model in a folder classifies sequences, by its ``config.json``."""
    return any(map(is_classifier, read_config(folder).get("architectures") or ()))


def classifier_config(path: str, *, key: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Returns the plain values of a reward model's ``config.json``: all that can be known without its weights.

    Args:
        path: a folder or a name on a hub.
        key: of the configuration, for messages.
        trust_remote_code: whether code that the folder brings along may be run.

    Raises:
        UserError: nothing there, code of its own, no classification head, more than one label, or a family that
            attends in both directions.
    """
    values = read_config(model_folder(path, weights=False))
    own = values.get("auto_map")
    if own and not trust_remote_code:
        refuse_own_code(path, code_files(own))
    found = values.get("architectures") or ["model of no named architecture"]
    if not is_classifier(found[0]):
        raise UserError(
            f"{key}: the model in {path} is a {found[0]}: it has no classification head",
            why="a reward model maps a conversation to one number, and no layer of this model was trained for that",
            fix="give a sequence classifier with one label; `hybridflow reward-model` trains one from such a model",
        )
    labels = len(values["id2label"]) if values.get("id2label") else 2
    if labels != 1:
        raise UserError(
            f"{key}: the {found[0]} in {path} has {labels} labels",
            why="a reward is one number; which of them, or which sum, would be a guess",
            fix="give a sequence classifier with one label (num_labels=1)",
        )
    return values


def load_classifier(
    path: str, *, seed: int = 0, packing: bool = True, trust_remote_code: bool = False, outline: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a sequence classifier of one label in float32, without dropout, and its tokenizer.

    A causal language model becomes one: its trunk, and a layer of zeros, so that its first values are 0.

    Args:
        path: see `models.load.load_model`.
        seed: for a function that makes random weights.
        packing: give it ragged attention; of families that the tests cover alone.
        trust_remote_code: run code that the folder brings along.
        outline: as in `load_model`.

    Raises:
        UserError: nothing there, no such model, weights that are not whole, or a family that is not known to pack.
    """
    logging.disable_progress_bar()
    if is_function_reference(path):
        made, tokenizer = from_function(path, seed)
        model = made if is_classifier(type(made).__name__) else _from_causal(made)
    else:
        own = holds_classifier(model_folder(path, weights=False))
        if own:
            classifier_config(path, key="model.path", trust_remote_code=trust_remote_code)
        else:
            causal_config(path, trust_remote_code=trust_remote_code)
        said = logging.get_verbosity()
        if not own:
            logging.set_verbosity_error()  # transformers warns that the head is a fresh one, which is meant
        try:
            model = from_folder(
                AutoModelForSequenceClassification,
                path,
                packing=packing,
                trust_remote_code=trust_remote_code,
                outline=outline,
                fresh=None if own else f"{HEAD}.",
                num_labels=1,
            )
        finally:
            logging.set_verbosity(said)
        if not own:
            _begin_at_zero(model)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    if state_reader(model) is None:
        raise UserError(
            f"the {type(model).__name__} in {path} has no layer {HEAD!r} that reads its last states",
            why="decoders of transformers have one; an encoder reads its first token, in another way",
            fix="give a decoder (LlamaForSequenceClassification, Qwen3ForSequenceClassification, ...)",
        )
    remove_dropout(model)
    refuse_both_directions(path, model)
    if packing:
        if model.config.model_type not in KNOWN:
            raise UserError(
                f"{type(model).__name__} ({model.config.model_type}) is not known to run on packed sequences",
                fix=f"set model.packing=false, or take one of {', '.join(KNOWN)}",
            )
        model.set_attn_implementation(ATTENTION)
    return model, tokenizer


def empty_classifier(config: Any, *, packing: bool, trust_remote_code: bool) -> PreTrainedModel:
    """Makes a classifier of one label with fresh weights, from a configuration of transformers."""
    config.num_labels = 1
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
        config,
        dtype=torch.float32,
        attn_implementation="eager" if packing else None,
        trust_remote_code=trust_remote_code,
    )
    return model


def padding_of(path: str, *, seed: int = 0) -> int | None:
    """Returns the padding token that a model's configuration names; of a function's model, that model's."""
    if is_function_reference(path):
        config = from_function(path, seed)[0].config
        return getattr(config.get_text_config(), "pad_token_id", None)
    values: Mapping[str, Any] = read_config(model_folder(path, weights=False))
    text: Mapping[str, Any] = values.get("text_config") or {}
    return text.get("pad_token_id", values.get("pad_token_id"))


def _from_causal(causal: PreTrainedModel) -> PreTrainedModel:
    """Makes a classifier with a causal language model's trunk."""
    if causal.config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise UserError(f"transformers has no sequence classifier of the family {causal.config.model_type}")
    with torch.random.fork_rng():
        model = empty_classifier(causal.config, packing=True, trust_remote_code=False)
    trunk: torch.nn.Module = getattr(model, model.base_model_prefix)
    trunk.load_state_dict(getattr(causal, causal.base_model_prefix).state_dict())
    _begin_at_zero(model)
    return model


def _begin_at_zero(model: PreTrainedModel) -> None:
    layer = getattr(model, HEAD, None)
    if isinstance(layer, torch.nn.Linear):
        torch.nn.init.zeros_(layer.weight)
