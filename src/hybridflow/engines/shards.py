"""Files of tensors that are cut over ranks, by torch.distributed.checkpoint: independent of who wrote and who reads.

    shards/*.safetensors    every rank's pieces; their place in the whole is in the files' headers

Reading needs no process group: every process reads just the pieces that it holds, or whole tensors. So a checkpoint of
two ranks is read by four, or by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hybridflow.models.files import other_kind, require_same_shapes

SHARDS, MOMENTS, PLAIN = "shards", "optimizer.safetensors", "engine.json"  # in an engine's part of a checkpoint
Moments = dict[str, dict[str, Tensor]]  # AdamW's state, by parameter name and kind
FILE_BYTES = 1 << 30  # of a rank's files: a file is put together in host memory


def write_shards(tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup) -> None:
    """Writes ``shards/`` into a folder; all ranks of the group call this with the same names.

    Args:
        tensors: DTensors, of which every rank writes its piece, and plain tensors, which are the same on every rank.
        folder: an existing folder.
        group: of processes that talk through host memory (gloo).

    Raises:
        OSError: or any other error that kept the first failing rank from writing; on all ranks.
    """
    writer = HuggingFaceStorageWriter(
        str(folder / SHARDS), fqn_to_index_mapping=_files_of(tensors, group.size()), save_distributed=True
    )
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Reads the shapes of all tensors in the safetensors files of a folder, put together where they are cut."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def read_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fills tensors with what the safetensors files of a folder have under their names; DTensors with their pieces."""
    if not tensors:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def whole_tensors(folder: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the whole tensors in the safetensors files of a folder, one after the other, sorted by name.

    About `FILE_BYTES` of them are in memory at a time.

    Args:
        folder: with the files.
        prefix: of the names that are wanted; it is left out of those that are returned.
    """
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    batch: dict[str, Tensor] = {}
    for name in sorted(n for n in found if n.startswith(prefix)):
        entry = found[name]
        assert isinstance(entry, TensorStorageMetadata)
        batch[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        if sum(t.nbytes for t in batch.values()) >= FILE_BYTES:
            read_shards(batch, folder)
            yield from ((n.removeprefix(prefix), t) for n, t in batch.items())
            batch = {}
    read_shards(batch, folder)
    yield from ((n.removeprefix(prefix), t) for n, t in batch.items())


def read_state(folder: Path, weights: Mapping[str, Tensor], *, source: Path, weights_too: bool = True) -> Moments:
    """Reads an engine's tensors: weights in place, and AdamW's moments, which are returned by parameter name.

    Args:
        folder: where the files are: "model/NAME" are weights, "exp_avg/NAME" and the like are moments.
        weights: all that the engine saves, by name; moments are cut as these are.
        source: the checkpoint, for messages.
        weights_too: whether weights are among the files.

    Raises:
        UserError: the checkpoint is of another model.
    """
    saved = {key.partition("/"): shape for key, shape in saved_shapes(folder).items()}
    if weights_too:
        own = {name: tuple(t.shape) for name, t in weights.items()}
        require_same_shapes(own, {name: s for (kind, _, name), s in saved.items() if kind == "model"}, source=source)
    moments: Moments = {}
    for kind, _, name in saved:
        if kind in ("step", "exp_avg", "exp_avg_sq"):
            like = weights[name]
            zeros = torch.zeros((), device=like.device) if kind == "step" else torch.zeros_like(like)
            moments.setdefault(name, {})[kind] = zeros
    tensors = {f"{kind}/{name}": t for name, kept in moments.items() for kind, t in kept.items()}
    if weights_too:
        tensors |= {f"model/{name}": t for name, t in weights.items()}
    read_shards(tensors, folder)
    return moments


def require_kind(folder: Path, *, adapters: bool) -> None:
    """Compares what a checkpoint has, adapters or all weights, with what is trained.

    Raises:
        UserError: it is the other.
    """
    if (folder / SHARDS).is_dir():
        has = any(name.startswith("model/") and ".lora_" in name for name in saved_shapes(folder / SHARDS))
    else:
        has = (folder / "adapter").is_dir()
    if has != adapters:
        raise other_kind(folder, adapters=adapters)


def _files_of(tensors: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
    """Returns in which of its files, from 1, every rank writes its piece of each tensor."""
    files, before = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + before // (FILE_BYTES * ranks)
        before += tensor.nbytes
    return files
