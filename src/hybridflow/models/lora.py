"""Low-rank adapters (LoRA, arXiv 2106.09685), by peft."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.config.sections.model import LoraSection, ModelSection
from hybridflow.errors import UserError, nearest
from hybridflow.models.checkpointing import checkpoint_activations
from hybridflow.models.classifier import load_classifier
from hybridflow.models.liger import apply_liger, require_liger
from hybridflow.models.load import load_model, require_vocabulary

ALL_LINEAR = "all-linear"


def add_lora(model: PreTrainedModel, lora: LoraSection, *, seed: int) -> PreTrainedModel:
    """Adds fresh adapters to the model, the only parameters that then require gradients.

    Args:
        model: a model that `models.load` loaded; it is changed in place and wrapped.
        lora: rank, scale and modules.
        seed: of the adapters' random half.

    Raises:
        UserError: peft is not installed, the model has no such modules, or one of them shares its weight with another
            module.
    """
    targets = _targets(model, lora.target_modules)
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "model.lora needs peft, which is not installed", fix="pip install 'hybridflow[lora]'"
        ) from error
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft reads the old name
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model, config)
        except ValueError as error:
            raise UserError(
                f"model.lora.target_modules {lora.target_modules!r} does not fit the model: {error}",
                fix=f"name linear layers, such as {', '.join(_linear_names(model))}, or all-linear",
            ) from error
    own = adapted.peft_config["default"]
    if isinstance(own.target_modules, set):
        own.target_modules = sorted(own.target_modules)  # a set would be written in another order by every process
    _refuse_shared(adapted)
    return adapted


def _refuse_shared(model: PreTrainedModel) -> None:
    """Raises a UserError for an adapter on a weight that another module computes with too, such as a tied output layer.

    Added into that weight the adapter would change the other module, which was trained without it.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        if len(shared) > 1 and any(".base_layer." in name for name in shared):
            plain = [name.removeprefix("base_model.model.").replace(".base_layer", "") for name in shared]
            raise UserError(
                f"model.lora.target_modules puts an adapter on {plain[-1]}, which is the same tensor as {plain[0]}",
                why="merged into it (to export the model, or to publish it), the adapter would change both",
                fix=f"leave {plain[-1].split('.')[-2]} out of model.lora.target_modules, or give a model whose "
                "config says tie_word_embeddings=false, with a tensor for each",
            )


def _targets(model: PreTrainedModel, named: str | list[str]) -> str | list[str]:
    """Returns what peft is to look for: a name stands for every module whose path ends in it, and is never a pattern.

    Raises:
        UserError: a name fits no module.
    """
    if named == ALL_LINEAR:
        return ALL_LINEAR
    names, paths = [named] if isinstance(named, str) else named, [path for path, _ in model.named_modules()]
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in paths):
            raise UserError(
                f"model.lora.target_modules: no module of the {type(model).__name__} is named {name!r}",
                why="a module is named by the end of its path, such as q_proj or layers.0.self_attn.q_proj; patterns "
                "are not read",
                fix=f"{nearest(name, _linear_names(model))}; several are a list, and {ALL_LINEAR} is every linear "
                "layer but the output's",
            )
    return names


def _linear_names(model: PreTrainedModel) -> list[str]:
    found = (path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    return sorted(set(found))


def load_trainable(
    section: ModelSection, *, seed: int, classifier: bool = False, outline: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model of a configuration, with fresh adapters where it asks for them, and its tokenizer.

    Every command loads models here, and gets their outlines here before anything is started. So all commands refuse the
    same models, in the same words.

    Args:
        section: which model.
        seed: of random weights and of adapters.
        classifier: as a sequence classifier of one label, without adapters: see `load_classifier`.
        outline: without its weights: see `load_model`.

    Raises:
        UserError: see `load_model`, `apply_liger`, `checkpoint_activations` and `add_lora`; or the tokenizer has ids
            that the model has no embedding for.
    """
    if section.liger:
        require_liger()  # checked first: loading takes minutes
    load = load_classifier if classifier else load_model
    model, tokenizer = load(
        section.path,
        seed=seed,
        packing=section.packing,
        trust_remote_code=section.trust_remote_code,
        outline=outline,
    )
    require_vocabulary(section.path, model, tokenizer, special=not classifier)
    if section.liger:
        apply_liger(model)
    if section.activation_checkpointing:
        checkpoint_activations(model)
    return (model if section.lora is None else add_lora(model, section.lora, seed=seed)), tokenizer


def has_adapters(model: torch.nn.Module) -> bool:
    """Returns whether this model was wrapped by `add_lora`."""
    return hasattr(model, "peft_config")


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a plain model with the adapters added into its weights; the given one is left as it is."""
    return copy.deepcopy(model).merge_and_unload() if has_adapters(model) else model


def load_adapters(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Reads adapters into a model that has some of the same shape; returns the tensors read, by peft's names."""
    import peft

    tensors = peft.load_peft_weights(str(folder), device="cpu")
    expected = peft.get_peft_model_state_dict(model)
    differing = sorted(n for n in tensors.keys() | expected.keys() if _shape(tensors, n) != _shape(expected, n))
    if differing:
        raise UserError(
            f"the adapters in {folder} are of another shape than model.lora says: {differing[0]} is "
            f"{_shape(tensors, differing[0])} there and {_shape(expected, differing[0])} here",
            fix="give the model.path and model.lora that the run began with",
        )
    peft.set_peft_model_state_dict(model, tensors)
    return tensors


def _shape(tensors: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
