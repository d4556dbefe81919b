"""What an engine writes while it goes on: copied first, then written by a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor
from torch.distributed.tensor import DTensor


class Background:
    """Does one thing at a time beside the caller."""

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
