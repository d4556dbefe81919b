"""Loading a causal language model and its tokenizer: from a folder, a hub, or a function of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from hybridflow.config.locate import is_function_reference, load_function
from hybridflow.errors import UserError
from hybridflow.models.attention import ATTENTION, attention
from hybridflow.models.families import use_packing
from hybridflow.models.outline import cannot_load, first_line, outlined, stored_shapes
from hybridflow.models.source import code_files, model_folder, read_config, refuse_own_code

AttentionInterface.register(ATTENTION, attention)


def load_model(
    path: str, *, seed: int = 0, packing: bool = True, trust_remote_code: bool = False, outline: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model, in float32 master weights, with ragged attention and without dropout, and its tokenizer.

    Args:
        path: a folder in Hugging Face format; ``org/name`` on the Hugging Face hub; ``modelscope://org/name``; or
            ``file.py:function``: the function is called with ``seed=`` (where it takes one) and returns (model,
            tokenizer).
        seed: for a function that makes random weights.
        packing: give it ragged attention; without, sequences are padded and the model keeps its own.
        trust_remote_code: run code that the folder brings along.
        outline: read no weights: the model is on the meta device, and what is wrong with its files is refused all the
            same. A function makes its model whole.

    Raises:
        UserError: nothing there, no causal language model, code of its own, weights that are not whole or not the
            configuration's, or attention that the ragged layout does not cover.
    """
    disable_progress_bar()  # a bar for every load and save would hide the run's own progress
    if is_function_reference(path):
        model, tokenizer = from_function(path, seed)
    else:
        causal_config(path, trust_remote_code=trust_remote_code)
        trust = trust_remote_code
        model = from_folder(AutoModelForCausalLM, path, packing=packing, trust_remote_code=trust, outline=outline)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    remove_dropout(model)
    refuse_both_directions(path, model)
    if packing:
        use_packing(model)
    return model, tokenizer


def load_tokenizer(path: str, *, seed: int = 0, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer alone; a function reference is called for it, a folder is read (see `load_model`).

    Raises:
        UserError: there is no tokenizer, it needs code of its own, or it has no end-of-sequence token.
    """
    if is_function_reference(path):
        tokenizer = from_function(path, seed)[1]
    else:
        folder = model_folder(path, weights=False)
        if not trust_remote_code:
            _refuse_own_tokenizer(path, folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # two libraries raise errors of any type where files are missing or damaged
            raise _no_tokenizer(path, first_line(error)) from error
    if not set(tokenizer.get_vocab().values()) - tokenizer.added_tokens_decoder.keys() - {*tokenizer.all_special_ids}:
        # transformers makes one of the family's special tokens where there are no files.
        names = ", ".join(sorted(tokenizer.get_vocab())[:5])
        raise _no_tokenizer(path, f"the tokenizer made of its files has special tokens alone: {names}")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {path} has no end-of-sequence token",
            why="without one no response ends before the length limit",
            fix="set eos_token in its tokenizer_config.json",
        )
    return tokenizer


def _no_tokenizer(path: str, what: str) -> UserError:
    return UserError(
        f"no tokenizer in {path}: {what}",
        fix="save the tokenizer into the model's folder (tokenizer.save_pretrained)",
    )


def require_vocabulary(
    path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, special: bool = True
) -> None:
    """Raises a UserError if the tokenizer has ids that the model has no embedding for.

    Args:
        path: of the model.
        model: the model, or its outline.
        tokenizer: its tokenizer.
        special: whether special tokens count: to a family's tokenizer transformers adds the family's own.
    """
    passed = set() if special else set(tokenizer.all_special_ids)
    ids, rows = max({*tokenizer.get_vocab().values()} - passed) + 1, model.get_input_embeddings().weight.shape[0]
    if rows < ids:
        token = tokenizer.convert_ids_to_tokens(ids - 1)
        raise UserError(
            f"the tokenizer of {path} has ids up to {ids - 1} ({token!r}), the model's vocabulary ends at {rows - 1}",
            why="a token without a row in the embedding ends the run when it first appears",
            fix=f"give the tokenizer that belongs to the model, or model.resize_token_embeddings({ids}) and save it",
        )


def causal_config(path: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Returns the plain values of a model's ``config.json``: all that can be known without its weights.

    Args:
        path: a folder or a name on a hub, see `load_model`.
        trust_remote_code: whether code that the folder brings along may be run.

    Raises:
        UserError: nothing there, code of its own, or no causal language model.
    """
    values = read_config(model_folder(path, weights=False))
    own = values.get("auto_map")
    if own and trust_remote_code:
        return values  # the code decides, and it runs only when the model is loaded
    if own and values.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        refuse_own_code(path, code_files(own))
    _require_causal_head(path, values)
    return values


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the token ids that end a response: the tokenizer's end of sequence, and those of the model's generation
    config.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    extra = configured if isinstance(configured, list) else [] if configured is None else [configured]
    odd = next((one for one in extra if not isinstance(one, int)), None)
    if odd is not None:
        raise UserError(
            f"eos_token_id in the model's generation_config.json has {odd!r}, which is no token id",
            fix=f"write numbers: the tokenizer's own end of sequence is {tokenizer.eos_token_id}",
        )
    return tuple(sorted({int(tokenizer.eos_token_id), *map(int, extra)}))


def from_folder(
    auto: Any,
    path: str,
    *,
    packing: bool,
    trust_remote_code: bool,
    outline: bool,
    fresh: str | None = None,
    **config: Any,
) -> PreTrainedModel:
    """Loads the model in a folder or on a hub, in float32.

    Args:
        auto: a class such as `AutoModelForCausalLM`.
        path: see `load_model`.
        packing: as in `load_model`.
        trust_remote_code: as in `load_model`.
        outline: as in `load_model`.
        fresh: beginning of the names of tensors that may be missing, if any may.
        config: changes to the model's configuration.

    Raises:
        UserError: it cannot be loaded, or its weights are not those of its configuration.
    """
    folder = model_folder(path, weights=not outline)
    shapes = stored_shapes(folder, path, outline=outline)
    how: dict[str, Any] = {
        "dtype": torch.float32,
        # Every model has eager attention; packing brings its own. Without packing, transformers chooses.
        "attn_implementation": "eager" if packing else None,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are in the report, by name
    }
    try:
        if outline:
            model, report = outlined(auto, folder, shapes, config_kwargs=config, **how)
        else:
            model, report = auto.from_pretrained(folder, **config, **how)
    except Exception as error:  # transformers raises errors of any type for an incomplete folder or a wrong config
        raise UserError(
            f"the model in {path} cannot be loaded: {first_line(error)}",
            fix="check that the folder is complete and holds such a model; newer families need a newer transformers "
            f"(this is {transformers.__version__})",
        ) from error
    kind = f"a {type(model).__name__}"
    missing = sorted(name for name in report.get("missing_keys", ()) if not (fresh and name.startswith(fresh)))
    if missing:
        raise UserError(
            f"the weights in {path} lack tensors of {kind} ({len(missing)}): {', '.join(missing[:3])}",
            why="they would start from random numbers",
            fix="fetch or save the model again",
        )
    for name, stored, wanted in sorted(report.get("mismatched_keys", ())):
        raise cannot_load(
            path, f"{name} is {tuple(stored)} in its weights, and {tuple(wanted)} in {kind} as its config.json says"
        )
    loaded: PreTrainedModel = model
    return loaded


def _require_causal_head(path: str, values: dict[str, Any]) -> None:
    """Raises a UserError for a folder of another kind, which would load with a random output layer or with attention in
    both directions.
    """
    known = _flat_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    found = values.get("architectures") or []
    if found and not known & set(found):
        raise UserError(
            f"the model in {path} is a {found[0]}: it has no head that predicts the next token",
            why="responses are generated, and scored, token by token from left to right",
            fix="give a causal language model (LlamaForCausalLM, Qwen3ForCausalLM, ...)",
        )


def _refuse_own_tokenizer(path: str, folder: Path) -> None:
    """Raises a UserError for a tokenizer with code of its own: without it, transformers would take another tokenizer
    that reads the same file.
    """
    values = read_config(folder, "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    own = (values.get("auto_map") or {}).get("AutoTokenizer")
    if own and not hasattr(transformers, values.get("tokenizer_class") or ""):
        refuse_own_code(path, code_files({"tokenizer": own}))


def refuse_both_directions(path: str, model: PreTrainedModel) -> None:
    """Raises a UserError for an encoder: its tokens see what comes after them."""
    encoder = getattr(model.config, "is_decoder", None) is False
    if encoder and any(getattr(module, "is_causal", None) is False for module in model.modules()):
        raise UserError(
            f"the {type(model).__name__} in {path} attends in both directions (is_decoder is false in its config)",
            why="a token would be predicted from itself",
            fix="give a causal language model (LlamaForCausalLM, Qwen3ForCausalLM, ...)",
        )


def _flat_names(names: Iterable[str | tuple[str, ...]]) -> set[str]:
    return {name for entry in names for name in ([entry] if isinstance(entry, str) else entry)}


def remove_dropout(model: PreTrainedModel) -> None:
    """Turns every dropout off: the trainer must score the distribution that was sampled.

    Modules keep rates as numbers too, and some read their configuration in every pass.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        _zero_rates(module)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        _zero_rates(config)


def _zero_rates(holder: object) -> None:
    for name, value in list(vars(holder).items()):
        if ("dropout" in name or name.endswith(("pdrop", "_drop"))) and isinstance(value, float):
            setattr(holder, name, 0.0)


def from_function(path: str, seed: int) -> tuple[Any, Any]:
    """Returns the model, in float32, and the tokenizer that a function of the user's makes.

    Raises:
        UserError: it returns something else.
    """
    function = load_function(path)
    takes_seed = "seed" in inspect.signature(function).parameters
    made = function(seed=seed) if takes_seed else function()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], PreTrainedModel)):
        raise UserError(
            f"{path} must return (model, tokenizer), a transformers model and its tokenizer",
            why=f"it returned {type(made).__name__}",
        )
    made[0].to(torch.float32)
    return made


def context_of(model: PreTrainedModel) -> int | None:
    """Returns the most tokens that a sequence may have, where the model has a bound."""
    bound: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return bound


def longest_trainable(model: PreTrainedModel) -> int | None:
    """Returns the most tokens that a sequence may have in training: see `require_context`."""
    bounds = (context_of(model), _length_of_one_rotation(model))
    return min((bound for bound in bounds if bound is not None), default=None)


def require_context(
    model: PreTrainedModel,
    tokens: int,
    what: str = "the longest possible sequence",
    *,
    why: str = "data.max_prompt_tokens + rollout.max_response_tokens, or + agent.max_tokens where the model acts",
    fix: str = "lower one of them, or take a model with a longer context",
) -> None:
    """Raises a UserError if sequences of this many tokens do not fit the model's context.

    Args:
        model: the model, or its outline.
        tokens: of the longest sequence.
        what: the longest sequence, in words.
        why: where the number comes from.
        fix: how to mend it.
    """
    original, context = _length_of_one_rotation(model), context_of(model)
    if original is not None and tokens > original:
        raise UserError(
            f"{what} has {tokens} tokens; the rotary embedding of {type(model).__name__} is "
            f"another one for a whole batch as soon as one sequence of it is longer than {original}",
            why="a sequence's probabilities would depend on what it is trained and generated with",
            fix=f"keep it within {original}: {fix}",
        )
    if context is not None and tokens > context:
        raise UserError(f"{what} has {tokens} tokens, the model's context is {context}", why=why, fix=fix)


def _length_of_one_rotation(model: PreTrainedModel) -> int | None:
    """Returns up to which length a rotary embedding that changes with the longest sequence stays the same; None if it
    never changes.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for entry in (rope, *rope.values()):  # some families have one for each kind of layer
        if isinstance(entry, dict) and entry.get("rope_type") in ("dynamic", "longrope"):
            own = entry.get("original_max_position_embeddings")
            return own or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return None
