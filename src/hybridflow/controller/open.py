"""Starting the processes of a run's pools, by the backend that the configuration names."""

from __future__ import annotations

from collections.abc import Sequence

from hybridflow.config.sections.placement import PlacementSection, resolved_placement
from hybridflow.controller.backend import Events
from hybridflow.controller.cluster import Cluster


def open_cluster(
    placement: PlacementSection,
    *,
    device: str = "auto",
    threads: int | None = None,
    preload: Sequence[str] = (),
    events: Events | None = None,
) -> Cluster:
    """Starts the processes of all pools.

    Args:
        placement: pools, and the back end that starts them. Without pools there is one, "all": this process, or all
            that torchrun started.
        device: ``run.device``.
        threads: of each process; the cores are shared among them if left out.
        preload: modules that every process needs: they are imported once where that is possible.
        events: called with kind and text of what a user should know; stderr if left out.

    Raises:
        UserError: a pool lacks devices, a port is taken, ...
    """
    placement = resolved_placement(placement)
    if not placement.pools:
        placement = placement.model_copy(update={"pools": {"all": 1}})
    if placement.backend == "torchrun":
        from hybridflow.controller.backends.torchrun import TorchrunBackend

        torchrun = TorchrunBackend(placement, device, threads)
        cluster = Cluster(placement, torchrun, events)
        torchrun.attend(cluster.pump)
        return cluster
    if placement.backend == "in_process":
        from hybridflow.controller.backends.in_process import InProcessBackend

        return Cluster(placement, InProcessBackend(device), events)
    if placement.backend == "processes":
        from hybridflow.controller.backends.processes import ProcessesBackend

        return Cluster(placement, ProcessesBackend(placement, device, threads, preload), events)
    from hybridflow.controller.backends.ray import RayBackend

    return Cluster(placement, RayBackend(placement, device, threads), events)
