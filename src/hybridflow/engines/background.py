"""What an engine writes while it goes on: copied first, then written by a thread of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from transformers.modeling_utils import PreTrainedModel


class Background:
    """Does one thing at a time beside the caller.

    What it does may read nothing that the caller goes on to use (a model, its configuration, a tokenizer): such things
    are copied, or rendered to bytes, before it is begun.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None  # most engines never need one
        self._under_way: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins; what was begun before must be `done`."""
        assert self._under_way is None, "two at a time"
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="save")
        self._under_way = self._thread.submit(work)

    def done(self, *, wait: bool) -> bool:
        """Whether it is over, or nothing was begun; with `wait`, when it is. What it raised is raised here."""
        if self._under_way is not None and (wait or self._under_way.done()):
            under_way, self._under_way = self._under_way, None
            under_way.result()
        return self._under_way is None


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are now, in host memory; those of one memory (tied ones) stay so."""
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
    """A model of the same modules and configuration, none of them shared, around copies of its tensors.

    Args:
        model: whose twin.
        tensors: what `host_copies` gave of its state; all else of it is copied here.
    """
    own = model.state_dict(keep_vars=True)
    made: dict[int, Tensor] = {}
    for name, tensor in own.items():
        copied = tensors[name]
        made[id(tensor)] = Parameter(copied, tensor.requires_grad) if isinstance(tensor, Parameter) else copied
    twin: PreTrainedModel = copy.deepcopy(model, made)
    return twin
