"""The namespaces and mounts by bubblewrap, for machines that allow them to its (setuid) program only. bwrap(1)."""

from __future__ import annotations

import shutil
from pathlib import PurePath
from typing import Any


def installed() -> str | None:
    """Returns the path of bwrap, if it is installed."""
    return shutil.which("bwrap")


def command(bwrap: str, view: dict[str, Any], interpreter: str, privileged: bool) -> list[str]:
    """Returns what precedes a Python command, so that it runs inside the sandbox: with the same view as
    `jail.build_root` makes.

    As root it keeps the capabilities to become the user nobody, which `jail.confine` then does, and to end processes
    that did. Else bwrap maps the user to nobody.
    """
    words = [bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if privileged:
        words += ["--cap-drop", "ALL"]
        words += [word for name in ("SETUID", "SETGID", "KILL") for word in ("--cap-add", f"CAP_{name}")]
    else:
        words += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    words += ["--die-with-parent", "--new-session"]
    words += ["--perms", "1777", "--size", str(view["tmp_bytes"]), "--tmpfs", "/tmp"]
    bound = [*view["read"], interpreter]
    for folder in sorted({str(parent) for path in bound for parent in PurePath(path).parents} - {"/", "/tmp"}):
        words += ["--perms", "0755", "--dir", folder]  # else they have the permissions that they have outside
    for path in view["read"]:
        words += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    for path in view["hide"]:
        words += ["--tmpfs", path, "--remount-ro", path]
    for path, target in view["links"]:
        words += ["--symlink", target, path]
    words += ["--ro-bind", interpreter, interpreter]
    return [*words, "--remount-ro", "/", "--chdir", "/tmp", "--"]
