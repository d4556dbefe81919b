"""The part of this machine's file system that a program may read: Python's own files and the system's libraries."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from typing import Any

TMP_BYTES, TMP_FILES = 64 << 20, 4096
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/urandom")
_PACKAGES = ("site-packages", "dist-packages")


@functools.cache
def interpreter() -> str:
    """Returns the Python that starts in a jail: where this is a virtual environment, the one that it was made from."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def view() -> dict[str, Any]:
    """Returns what `jail.build_root` needs: paths to bind read-only, paths to cover, and links to set.

    Installed packages are covered: programs have the standard library alone. Home, /proc, /sys, /etc and /tmp of this
    machine are absent, and so are this library's own files.
    """
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}  # not a virtual environment over it
    stdlib = {os.path.realpath(sysconfig.get_path(name, vars=base)) for name in ("stdlib", "platstdlib")}
    wanted = {path for path in (*stdlib, *_LIBRARIES) if os.path.exists(path)}
    links = sorted((path, os.readlink(path)) for path in wanted if os.path.islink(path))
    real = {path for path in wanted if not os.path.islink(path)}
    read = sorted(path for path in real if not any(path.startswith(other + "/") for other in real))
    places = {os.path.join(path, name) for path in stdlib for name in _PACKAGES}
    places |= {os.path.join("/usr/lib/python3", name) for name in _PACKAGES}
    hide = sorted(p for p in places if os.path.isdir(p) and any(p.startswith(r + "/") for r in read))
    return {
        "read": [*read, *_DEVICES],
        "hide": hide,
        "links": links,
        "tmp_bytes": TMP_BYTES,
        "tmp_files": TMP_FILES,
    }


@functools.cache
def privileged() -> bool:
    """Returns whether this process is root with the power to mount, and needs no user namespace to build walls."""
    if os.geteuid() != 0:
        return False
    with open("/proc/self/status") as file:
        held = next(line for line in file if line.startswith("CapEff:"))
    return bool(int(held.split()[1], 16) >> 21 & 1)  # CAP_SYS_ADMIN
