"""Opens the sandbox for programs of the policy. docs/sandbox.md says what it protects, and what it does not."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from hybridflow.errors import UserError
from hybridflow.rewards.sandbox import bubblewrap
from hybridflow.rewards.sandbox.fusion import FusionSandbox
from hybridflow.rewards.sandbox.local import LocalSandbox, Walls
from hybridflow.rewards.sandbox.outcome import Limits, Sandbox, SandboxError

_PROBE = "print(6 * 7)"


def open_sandbox(settings: Mapping[str, Any] | None = None) -> Sandbox:
    """Opens the sandbox that the section `reward.sandbox` describes, after it has run a tiny program.

    It is opened, and tried, once per process and settings.

    Args:
        settings: the section's keys; those that are left out have its defaults.

    Raises:
        UserError: programs cannot be contained here, or the server does not answer.
    """
    return _open(tuple(sorted((settings or {}).items())))


@functools.cache
def _open(settings: tuple[tuple[str, Any], ...]) -> Sandbox:
    from hybridflow.config.sections.rewards import SandboxSection

    section = SandboxSection(**dict(settings))
    limits = Limits(section.seconds, section.memory_mb, section.output_kb)
    if section.backend == "fusion":
        assert section.url is not None, "RewardSection asks for it"
        remote = FusionSandbox(section.url, limits, section.parallel)
        _try(remote, f"the Sandbox Fusion server {section.url} does not run programs", "start it, or mend the address")
        return remote
    if section.backend == "unsafe":
        return LocalSandbox("none", limits, section.parallel)
    walls: Walls = "local"
    if section.backend == "bubblewrap" or (section.backend == "auto" and bubblewrap.installed()):
        walls = "bubblewrap"
    local = LocalSandbox(walls, limits, section.parallel)
    _try(
        local,
        "programs that a model wrote cannot be contained on this machine",
        "let this process make namespaces (unprivileged user namespaces, or CAP_SYS_ADMIN in a container) and use "
        "Landlock; or set reward.sandbox.backend=fusion and reward.sandbox.url; or, where a program may do whatever "
        "you may, reward.sandbox.backend=unsafe",
    )
    return local


def _try(sandbox: Sandbox, what: str, fix: str) -> None:
    try:
        outcome = sandbox.run(_PROBE, "")
    except SandboxError as error:
        raise UserError(what, why=str(error), fix=fix) from error
    if (outcome.status, outcome.stdout.strip()) != ("ok", "42"):
        raise UserError(
            what,
            why=f"a program that prints 42 gave {outcome.status}: {(outcome.stdout + outcome.stderr)[-300:]!r}",
            fix=fix,
        )
