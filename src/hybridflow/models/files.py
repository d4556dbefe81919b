"""A model's weights on disk: whole or as adapters in a checkpoint, and as a plain Hugging Face folder for others."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hybridflow.errors import UserError
from hybridflow.models.classifier import empty_classifier, holds_classifier
from hybridflow.models.lora import has_adapters, load_adapters, merged
from hybridflow.models.probe import probe_scores, require_same

FILE_BYTES = 2 << 30  # of an exported file: it is put together in memory


def write_weights(model: PreTrainedModel, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes ``model/`` (weights and config in Hugging Face's format), or ``adapter/`` where adapters are trained.

    Args:
        model: says in what form.
        folder: of the checkpoint.
        tensors: the model's ``state_dict()``, or copies of what it was.
    """
    model.save_pretrained(folder / ("adapter" if has_adapters(model) else "model"), state_dict=dict(tensors))


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """Writes what stands beside a model's weights in its folder: configurations, and code of its own."""
    model.save_pretrained(folder, state_dict={})
    (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # of some versions, an empty one


def files_beside_weights(model: PreTrainedModel) -> dict[str, bytes]:
    """Returns what `write_config` writes, by file name: for a caller that writes it when the model is in use
    elsewhere.
    """
    with TemporaryDirectory() as folder:
        write_config(model, Path(folder))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def read_weights(model: PreTrainedModel, folder: Path) -> None:
    """Reads what `write_weights` wrote into a model of the same shape.

    Raises:
        UserError: the checkpoint is another model's.
    """
    if has_adapters(model):
        load_adapters(model, folder / "adapter")
    else:
        assign_weights(model, read_model(folder), source=folder)


def read_model(folder: Path) -> dict[str, Tensor]:
    """Reads the whole weights in ``model/`` under the names of a model in memory, whatever names they have in the
    files.
    """
    # Through from_pretrained, because saving may rename and regroup tensors (fused experts).
    auto = AutoModelForSequenceClassification if holds_classifier(folder / "model") else AutoModelForCausalLM
    return dict(auto.from_pretrained(folder / "model", dtype=torch.float32).state_dict())


def empty_model(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Makes a model without weights (on the meta device) from the configuration in a folder."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        if holds_classifier(folder):
            return empty_classifier(config, packing=False, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def read_adapters(names: Iterable[str], folder: Path) -> dict[str, Tensor]:
    """Reads the whole adapters in ``adapter/`` under these names of a model; in the file, the adapter's own name is
    left out.
    """
    import peft

    saved = peft.load_peft_weights(str(folder / "adapter"), device="cpu")
    own = {re.sub(r"\.default(?=(\.\w+)?$)", "", name): name for name in names if ".lora_" in name}
    return {own.get(name, name): tensor for name, tensor in saved.items()}


def other_kind(folder: Path, *, adapters: bool) -> UserError:
    """Makes the error for a checkpoint that has all weights where adapters are trained, or the other way round."""
    other = "all weights" if adapters else "adapters only"
    return UserError(
        f"the checkpoint {folder} holds {other}, the configuration trains "
        + ("adapters (model.lora)" if adapters else "all weights"),
        fix="give the model.lora that the run began with, or another run.folder",
    )


def assign_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor], *, source: Path) -> None:
    """Copies tensors into a model's state under the same names.

    Raises:
        UserError: names or shapes are another model's.
    """
    own = model.state_dict()
    require_same_shapes(
        {n: tuple(t.shape) for n, t in own.items()}, {n: tuple(t.shape) for n, t in tensors.items()}, source=source
    )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def require_same_shapes(
    own: Mapping[str, tuple[int, ...]], saved: Mapping[str, tuple[int, ...]], *, source: Path
) -> None:
    """Compares the names and shapes of a model's tensors with those of a checkpoint.

    Raises:
        UserError: they differ; the message names the first of each kind.
    """
    absent, strange = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    shapes = sorted(n for n in own.keys() & saved.keys() if own[n] != saved[n])
    if absent or strange or shapes:
        detail = [f"it lacks {absent[0]}"] if absent else []
        detail += [f"it has {strange[0]}, which the model lacks"] if strange else []
        detail += [f"{n} is {saved[n]} there and {own[n]} here" for n in shapes[:1]]
        raise UserError(
            f"the checkpoint {source} is from another model: {'; '.join(detail)}",
            fix="give the model.path that the run began with, or another run.folder",
        )


def export_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a plain Hugging Face folder without a tokenizer, adapters merged; the model is left as it is.

    The merged weights are compared with the trained model on a probe, in memory and once more as they are read back.

    Args:
        model: the trained model.
        folder: an existing, empty folder.
        dtype: precision of the written weights.

    Raises:
        UserError: with its adapters merged the model is another one; a weight is not finite.
    """
    plain = merged(model)
    if has_adapters(model):
        trained = probe_scores(model)
        with model.disable_adapter():
            before = probe_scores(model)
        require_same("the model with its adapters merged", probe_scores(plain), trained, before)
    plain.save_pretrained(folder, state_dict=dict(_finite(plain.state_dict().items(), dtype)))
    config = copy.deepcopy(plain.config)
    config.dtype = dtype  # save_pretrained wrote the model's own, whatever the state's is
    config.save_pretrained(folder)
    if has_adapters(model):
        if dtype != torch.float32:  # the rounding to `dtype` is no fault
            for parameter in plain.parameters():
                parameter.data = parameter.data.to(dtype).to(parameter.dtype)
            trained = probe_scores(plain)
        kind, device = type(plain), plain.device
        del plain
        written = kind.from_pretrained(folder, dtype=torch.float32).to(device)
        require_same(f"the model read back from {folder}", probe_scores(written), trained, before)


def write_adapters(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the adapters alone, in peft's format."""
    model.save_pretrained(folder, state_dict={name: tensor.to(dtype) for name, tensor in model.state_dict().items()})


def write_streamed(
    model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Writes a plain Hugging Face folder from whole tensors that come one after the other, as `save_pretrained` would.

    Of the tensors, no more than a file of `FILE_BYTES` and a layer are in memory at a time.

    Args:
        model: says what stands beside weights, and how tensors are named in files; its own tensors are not read.
        tensors: under the model's names, each layer's together; tied ones may come under each of theirs.
        folder: an existing, empty folder.
        dtype: precision of the written weights.

    Raises:
        UserError: a weight is not finite.
    """
    write_config(model, folder)
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.save_pretrained(folder)
    tied = model.all_tied_weights_keys.keys()
    untied = _finite(((name, tensor.cpu()) for name, tensor in tensors if name not in tied), dtype)
    places: dict[str, int] = {}
    waiting: dict[str, Tensor] = {}
    files = sizes = 0

    def write() -> None:
        nonlocal files, waiting
        save_file(waiting, folder / f"part-{files}", metadata={"format": "pt"})
        places.update(dict.fromkeys(waiting, files))
        files, waiting = files + 1, {}

    for _, layer in groupby(untied, key=lambda entry: _layer_of(entry[0])):
        # Files have other names and other shapes than modules (fused experts are apart): layer by layer, as reverting
        # may need several tensors of a layer together.
        for name, tensor in revert_weight_conversion(model, dict(layer)).items():
            waiting[name] = tensor.contiguous()
            sizes += tensor.nbytes
            if sum(t.nbytes for t in waiting.values()) >= FILE_BYTES:
                write()
    if waiting:
        write()
    names = (
        [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)] if files > 1 else [SAFE_WEIGHTS_NAME]
    )
    for i, name in enumerate(names):
        (folder / f"part-{i}").rename(folder / name)
    if files > 1:
        index = {"metadata": {"total_size": sizes}, "weight_map": {n: names[i] for n, i in sorted(places.items())}}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _finite(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Converts the tensors to another precision.

    Raises:
        UserError: one of them is not finite, or has no form in that precision.
    """
    for name, tensor in tensors:
        rounded = tensor.to(dtype)
        if not bool(rounded.isfinite().all()):
            narrow = bool(tensor.isfinite().all())  # the value is finite, but out of the precision's range
            raise UserError(
                f"{name} is not finite" + f" in {str(dtype).removeprefix('torch.')}" * narrow,
                why="a model with such a weight computes nothing",
                fix="give another --dtype: bfloat16 has the range of float32"
                if narrow
                else "export an earlier checkpoint (--step)",
            )
        yield name, rounded


def _layer_of(name: str) -> str:
    """Returns a tensor's name up to the number of its layer; a tensor outside of the layers is a layer of its own."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else name
