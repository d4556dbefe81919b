"""A model's outline: the names and shapes of its tensors, from the headers of its files.

No weight is read. Whatever loading would refuse, the outline refuses, within a second and before anything has started.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hybridflow.errors import UserError
from hybridflow.models.source import MODELSCOPE, is_hub_name, read_config

AGAIN = "fetch, copy or save the model again"
LFS = b"version https://git-lfs"  # the first bytes of the file that Git leaves in the place of a large one
MOST = 300  # characters of a library's message that are shown

Shapes = dict[str, tuple[int, ...]]


def stored_shapes(folder: Path, path: str, *, outline: bool) -> Shapes | None:
    """Reads the shapes of all tensors in a model's folder, by their names in its files.

    Args:
        folder: of the model.
        path: the name that the user gave.
        outline: whether weights that are on a hub may still be there.

    Returns:
        None where a hub has the weights, or part of them.

    Raises:
        UserError: a file is missing, cut short or no file of weights.
    """
    names = _weight_files(folder, path)
    absent = [name for name in names or () if not (folder / name).is_file()]
    if names and not absent:
        return {name: shape for file in names for name, shape in _shapes_in(folder / file, path).items()}
    if outline and (is_hub_name(path) or path.startswith(MODELSCOPE)):
        return None
    if absent:
        raise cannot_load(
            path, f"its index names {len(names or ())} files of weights, and {len(absent)} are not there: {absent[0]}"
        )
    raise cannot_load(path, f"it holds no weights ({SAFE_WEIGHTS_NAME}, or {SAFE_WEIGHTS_INDEX_NAME} and its files)")


def outlined(
    auto: Any,
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]] | None,
    *,
    config_kwargs: Mapping[str, Any],
    **kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Returns what ``auto.from_pretrained`` would load, on the meta device, and its report.

    Transformers itself loads it, and is given tensors without memory in the place of those in files.

    Args:
        auto: a class such as `AutoModelForCausalLM`.
        folder: of the model.
        shapes: what `stored_shapes` found.
        config_kwargs: changes to the configuration.
        kwargs: as for ``from_pretrained``.
    """
    trust = kwargs.pop("trust_remote_code")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust, **config_kwargs)
    with torch.device("meta"):
        model = auto.from_config(
            config,
            dtype=kwargs["dtype"],
            attn_implementation=kwargs["attn_implementation"],
            trust_remote_code=trust,
        )
    report: dict[str, Any] = {}
    if shapes is not None:
        # A device map needs accelerate; without it the tensors are views of one number, which take no memory either.
        meta = importlib.util.find_spec("accelerate") is not None
        one = torch.empty((), dtype=kwargs["dtype"], device="meta" if meta else "cpu")
        model, report = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict={name: one.expand(shape) for name, shape in shapes.items()},
            device_map={"": "meta"} if meta else None,
            **kwargs,
        )
        model.to("meta")
    if (folder / "generation_config.json").is_file():  # it names the tokens that end a response
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, report


def cannot_load(path: str, what: str) -> UserError:
    """Makes the error for a model that is not whole."""
    return UserError(f"the model in {path} cannot be loaded: {what}", fix=AGAIN)


def _weight_files(folder: Path, path: str) -> list[str] | None:
    """Returns the files that transformers would read, in its order of preference; None: there are none."""
    explicit = read_config(folder).get("transformers_weights")
    usual = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
    for name in [str(explicit)] if explicit else usual:
        if not (folder / name).is_file():
            continue
        if not name.endswith(".index.json"):
            return [name]
        places = read_config(folder, name).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise cannot_load(path, f"{name} has no weight_map, which says where the tensors are")
        return sorted({str(file) for file in places.values()})
    return None


def _shapes_in(file: Path, path: str) -> Shapes:
    with file.open("rb") as opened:
        if opened.read(len(LFS)) == LFS:
            raise cannot_load(
                path, f"{file.name} is a pointer of Git LFS, not the file itself (`git lfs pull` gets it)"
            )
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        archive = is_zipfile(file)  # files of the old format are no archives, and cannot be mapped
        held = torch.load(file, map_location="meta", mmap=archive, weights_only=True)
        return {name: tuple(value.shape) for name, value in held.items() if isinstance(value, torch.Tensor)}
    except Exception as error:  # of two libraries, without a common base class
        said = f"{file.name} ({file.stat().st_size} bytes) is damaged or was cut short: {first_line(error)}"
        raise cannot_load(path, said) from error


def first_line(error: BaseException) -> str:
    """Returns an exception's message in one line: in some, the second line names the cause."""
    return " ".join(str(error).split())[:MOST] or type(error).__name__
