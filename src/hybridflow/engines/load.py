"""Loading a model for a sharded engine: rank 0 reads the weights, the other ranks make its modules without any."""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.config.locate import is_function_reference
from hybridflow.config.sections import ModelSection
from hybridflow.models.attention import ATTENTION
from hybridflow.models.checkpointing import checkpoint_activations
from hybridflow.models.classifier import empty_classifier
from hybridflow.models.load import load_tokenizer, remove_dropout
from hybridflow.models.lora import add_lora, load_trainable
from hybridflow.models.source import model_folder


def load_sharded(
    section: ModelSection, *, seed: int, classifier: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What `load_trainable` loads, to be given to a `ShardedModel` by all ranks of the default process group.

    Only rank 0 holds weights, in host memory; the others have the same modules on the meta device. A function of the
    user's makes a whole model on every rank: it is asked for small ones.

    Args:
        section: which model.
        seed: of random weights and of adapters.
        classifier: as a sequence classifier of one label.

    Raises:
        UserError: see `load_trainable`; on rank 0, while the others wait for it.
    """
    if is_function_reference(section.path):
        return load_trainable(section, seed=seed, classifier=classifier)
    if dist.get_rank() == 0:
        loaded = load_trainable(section, seed=seed, classifier=classifier)
        dist.barrier()  # what had to be fetched is there now, and fits
        return loaded
    dist.barrier()
    tokenizer = load_tokenizer(section.path, trust_remote_code=section.trust_remote_code)
    return _without_weights(section, seed, classifier), tokenizer


def _without_weights(section: ModelSection, seed: int, classifier: bool) -> PreTrainedModel:
    """The model that `load_trainable` loads, on the meta device; whether it can be loaded, rank 0 has found out."""
    folder, trust = model_folder(section.path, weights=False), section.trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    with torch.device("meta"):
        if classifier:
            model = empty_classifier(config, packing=section.packing, trust_remote_code=trust)
        else:
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation="eager" if section.packing else None,
                trust_remote_code=trust,
            )
        remove_dropout(model)
        if section.packing:
            model.set_attn_implementation(ATTENTION)
        if (folder / "generation_config.json").is_file():  # it says which tokens end an answer
            model.generation_config = GenerationConfig.from_pretrained(folder)
        if section.activation_checkpointing:
            checkpoint_activations(model)
        return model if section.lora is None else add_lora(model, section.lora, seed=seed)
