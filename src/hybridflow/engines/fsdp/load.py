"""Loading a model for a sharded engine: rank 0 reads the weights, the other ranks make its modules without any."""

from __future__ import annotations

import torch.distributed as dist
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.config.locate import is_function_reference
from hybridflow.config.sections.model import ModelSection
from hybridflow.models.lora import load_trainable


def load_sharded(
    section: ModelSection, *, seed: int, classifier: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads what `load_trainable` loads, for a `ShardedModel`, on all ranks of the default process group.

    Only rank 0 holds weights, in host memory; the others have the same modules on the meta device. A function of the
    user's makes a whole model on every rank, so it should make small ones.

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
        dist.barrier()  # the files are fetched by now, and were checked
        return loaded
    dist.barrier()
    return load_trainable(section, seed=seed, classifier=classifier, outline=True)
