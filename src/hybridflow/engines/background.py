"""Files that an engine writes while it continues: the state is copied first, then written by a separate thread."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from transformers.modeling_utils import PreTrainedModel


class Background:
    """Runs one piece of work at a time beside the caller.

    The work may read nothing that the caller continues to use (a model, its configuration, a tokenizer): such objects
    are copied, or rendered to bytes, before the work begins.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None  # made at the first use: most engines never need one
        self._under_way: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins the work; earlier work must be `done`."""
        assert self._under_way is None, "two at a time"
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="save")
        self._under_way = self._thread.submit(work)

    def done(self, *, wait: bool) -> bool:
        """Returns whether the work is over, or none was begun; with `wait`, blocks until it is over. Raises what the
        work raised.
        """
        if self._under_way is not None and (wait or self._under_way.done()):
            under_way, self._under_way = self._under_way, None
            under_way.result()
        return self._under_way is None


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies the tensors as they are now to host memory; those of one memory (tied ones) stay so."""
    copies: dict[int, Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        key = local.data_ptr() if local.numel() else id(tensor)
        if key not in copies:
            copy = local.detach().to("cpu", copy=True)
            if isinstance(tensor, DTensor):  # from_local would move it to the mesh's device
                copy = DTensor(copy, tensor._spec, requires_grad=False)
            copies[key] = copy
        found[name] = copies[key]
    return found


def host_twin(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """Makes a model of the same modules and configuration, none of them shared, around copies of its tensors.

    Args:
        model: the model to copy.
        tensors: the state that `host_copies` gave; all else is copied here.
    """
    own = model.state_dict(keep_vars=True)
    made: dict[int, Tensor] = {}
    for name, tensor in own.items():
        copied = tensors[name]
        made[id(tensor)] = Parameter(copied, tensor.requires_grad) if isinstance(tensor, Parameter) else copied
    twin: PreTrainedModel = copy.deepcopy(model, made)
    return twin
