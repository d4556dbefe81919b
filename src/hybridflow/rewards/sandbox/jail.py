"""Builds the walls around one program, starts it inside, waits for it, and reports how it ended.

This file is run by `local.py` in a Python process of its own, with nothing but the standard library. The process that
builds the walls stays outside as the supervisor; its child drops every privilege and becomes the program, so that one
start of Python is enough. Requests come from `local.py` alone, through a sealed file in memory.

With the walls "local":

- the supervisor has the namespaces (mount, pid, net, ipc, uts, cgroup; for an ordinary user also the user namespace
  that they need) and a root directory made of read-only binds and one small private tmpfs;
- the child is process 1 of the pid namespace, so that nothing outlives it. It has limits, no user of the host and no
  capability, a user namespace of its own, a Landlock domain, and last the seccomp filter.

Sources: namespaces(7), pivot_root(2), mount_setattr(2), landlock(7), seccomp(2), capabilities(7).
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]
import ctypes
import os
import resource
import select
import struct
import sys
import time

TYPE_CHECKING = False  # typing takes long to import; so does signal, which only wraps _signal
if TYPE_CHECKING:
    from typing import Any

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
OTHER_NAMESPACES = 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # cgroup, uts, ipc, pid, net
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
ATTR_READ_ONLY, ATTR_NOSUID, ATTR_NODEV, AT_FDCWD, AT_RECURSIVE = 1, 2, 4, -100, 0x8000
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 4, 38, 22, 2
CAPABILITY_VERSION_3 = 0x20080522
CLOSE_RANGE, MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 436, 442, 444, 445, 446  # as on all
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

# Landlock's rights, and from which version of its interface on they exist.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE, MAKE_DIR, MAKE_FILE, MAKE_FIFO, MAKE_LINK = 1 << 4 | 1 << 5, 1 << 7, 1 << 8, 1 << 10, 1 << 12
REFER, TRUNCATE = 1 << 13, 1 << 14
RIGHTS_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
TMP_RIGHTS = (
    WRITE_FILE | READ_FILE | READ_DIR | REMOVE | MAKE_DIR | MAKE_FILE | MAKE_FIFO | MAKE_LINK | REFER | TRUNCATE
)

libc = ctypes.CDLL(None, use_errno=True)


class WallError(Exception):
    """A wall that could not be built. The program is then not started."""


def main(request: dict[str, Any]) -> None:
    """Builds what the request asks for, runs the program, and writes one line to the request's `report` descriptor.

    The line is `ended HOW CODE CPU_SECONDS PEAK_KIB`, where HOW is exited (CODE: its status), killed (CODE: the
    signal), timeout, or stopped (the caller has ended, or has closed `lifeline`); or `broken REASON`.
    """
    report = request["report"]
    try:
        if request["walls"] == "local":
            enter_namespaces(request["privileged"])
            build_root(request["view"])
        setup_read, setup_write = os.pipe()
        child = os.fork()
    except (OSError, WallError) as error:
        os.write(report, f"broken {error}".encode())
        return
    if child == 0:
        # Returns only where the walls stand; the interpreter then ends as it does after any program.
        confine(request, setup_write)
        run_driver(request)
        return
    os.close(setup_write)
    reason = os.read(setup_read, 1000)  # empty: the child has closed it, and the program begins
    if reason:
        os.waitpid(child, 0)
        line = b"broken " + reason
    else:
        line = supervise(child, request).encode()
    os.write(report, line)
    os._exit(0)  # this process holds no part of the program's interpreter; there is nothing to clean up


def run_driver(request: dict[str, Any]) -> None:
    """Runs the last step in the child: the code that calls the program."""
    space: dict[str, Any] = {"__name__": "driver"}
    for code in request["driver"]:
        exec(code, space)
    function, arguments = request["call"]
    space[function](*arguments)


def supervise(child: int, request: dict[str, Any]) -> str:
    """Waits for the child until its time is up or its caller has ended; it is then killed."""
    began, limit, lifeline = time.monotonic(), request["seconds"], request["lifeline"]
    watch = select.poll()
    ended = os.pidfd_open(child)
    watch.register(ended, select.POLLIN)
    watch.register(lifeline, select.POLLIN)
    ready = {fd for fd, _ in watch.poll(limit * 1000)}
    elapsed = time.monotonic() - began
    how = ""
    if ended not in ready:
        how = "stopped" if lifeline in ready else "timeout"
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    if request["walls"] == "none":
        end_group(child)
    code = os.waitstatus_to_exitcode(status)
    cpu = used.ru_utime + used.ru_stime
    if not how and code == -signal.SIGKILL and cpu >= request["limits"]["CPU"] * 0.95:
        how = "timeout"
    how = how or ("killed" if code < 0 else "exited")
    return f"ended {how} {abs(code)} {cpu:.4f} {used.ru_maxrss} {elapsed:.4f}"


def end_group(leader: int) -> None:
    """Ends the process group of the program: without a pid namespace no other process of it can be found."""
    try:  # noqa: SIM105  (contextlib takes long to import)
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:  # nothing was left
        pass


# --- the walls of the supervisor ---


def enter_namespaces(privileged: bool) -> None:
    """Enters its own namespaces for mounts, processes, network, message queues, host name and control groups.

    An ordinary user gets them through a user namespace, in which it is mapped to the user nobody. Root needs no user
    namespace here: the others then belong to root, and the program, which is not root, has no power over them, whatever
    it becomes later.
    """
    if os.geteuid() == 0 and not privileged:  # root of a container that may not mount
        become_nobody()
        call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self would still be root's
    user, group = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | OTHER_NAMESPACES | (0 if privileged else CLONE_NEWUSER)
    call("unshare", flags)
    if not privileged:
        for name, text in [
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {user} 1"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ]:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def build_root(view: dict[str, Any]) -> None:
    """Builds a root directory with `read` bound read-only, `hide` covered, and an empty, writable /tmp."""
    os.umask(0o022)
    call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    root = "/proc"  # a folder that every Linux has, and that nothing else is bound from
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m,nr_inodes=1000")
    os.mkdir(root + "/tmp")
    size, files = view["tmp_bytes"], view["tmp_files"]
    options = f"mode=1777,size={size},nr_inodes={files}"
    mount("tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    for path in view["read"]:  # after /tmp, as Python itself may lie in there
        target = root + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "x").close()
        mount(path, target, "none", MS_BIND | MS_REC, None)
        set_attributes(target, ATTR_READ_ONLY | ATTR_NOSUID | (0 if path.startswith("/dev/") else ATTR_NODEV), True)
    for path in view["hide"]:
        mount("tmpfs", root + path, "tmpfs", MS_NOSUID | MS_NODEV | 1, "mode=0555,size=4k,nr_inodes=2")
    for path, target in view["links"]:
        os.symlink(target, root + path)
    set_attributes(root, ATTR_READ_ONLY | ATTR_NOSUID | ATTR_NODEV, False)
    os.chdir(root)
    number = PIVOT_ROOT[os.uname().machine]
    call("syscall", ctypes.c_long(number), b".", b".", label="pivot_root")
    call("umount2", b".", MNT_DETACH)  # the old root lay over the new one
    os.chdir("/tmp")


def mount(source: str, target: str, kind: str, flags: int, options: str | None) -> None:
    """Calls mount(2)."""
    call(
        "mount",
        os.fsencode(source),
        os.fsencode(target),
        kind.encode(),
        ctypes.c_ulong(flags),
        options.encode() if options is not None else None,
        label=f"mount {source}",
    )


def set_attributes(path: str, attributes: int, below: bool) -> None:
    """Calls mount_setattr(2): unlike a remount, it keeps the flags that the mount had, which an ordinary user may not
    remove.
    """
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    flags = AT_RECURSIVE if below else 0
    call(
        "syscall",
        ctypes.c_long(MOUNT_SETATTR),
        AT_FDCWD,
        os.fsencode(path),
        flags,
        wanted,
        ctypes.c_size_t(len(wanted)),
        label=f"mount_setattr {path}",
    )


# --- the walls of the program ---


def confine(request: dict[str, Any], setup: int) -> None:
    """Drops every privilege that the program must not have; if that fails, reports the reason to `setup`, and ends."""
    try:
        os.setsid()
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)  # the process that started this one may have ignored some
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python has it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        keep = sorted({0, 1, 2, setup, *request["keep"]})
        for before, after in zip(keep, [*keep[1:], 1 << 31]):
            if before + 1 < after:
                call("syscall", ctypes.c_long(CLOSE_RANGE), before + 1, after - 1, 0, label="close_range")
        if request["walls"] == "none":
            set_limits(request["limits"])
        else:
            drop_privileges(request)
            landlock(request["view"]["read"])
            if not request["filter"]:
                raise WallError(f"there is no seccomp filter for {os.uname().machine}")
            install_filter(request["filter"])
        os.chdir(request["folder"])
        os.environ.clear()
        sys.argv[:] = ["program.py"]
    except (OSError, WallError, ValueError) as error:
        os.write(setup, str(error).encode())
        os._exit(1)
    os.close(setup)


def drop_privileges(request: dict[str, Any]) -> None:
    """Changes from root to nobody, in a user namespace in which nobody has no name. The process has no capability and
    can gain none.
    """
    if request["privileged"]:
        # Threads are counted in each user namespace and in those around it; the limits of the outer ones hold too.
        most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
        become_nobody()
        call("unshare", CLONE_NEWUSER)
    set_limits(request["limits"])
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header, nothing = struct.pack("Ii", CAPABILITY_VERSION_3, 0), struct.pack("6I", *[0] * 6)
    call("capset", header, nothing)
    if 0 in os.getresuid():
        raise WallError("the program would run as root")


def become_nobody() -> None:
    """Becomes a user that has no group and owns nothing."""
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError as error:
        raise WallError(f"this root may not become another user: {error.strerror}") from error


def set_limits(limits: dict[str, Any]) -> None:
    """Sets limits that cannot be raised again; keeps lower ones that hold already."""
    for name, wanted in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (value, value))


def landlock(read: list[str]) -> None:
    """Allows only reading `read` and using /tmp: no TCP, no abstract sockets, no signals to processes outside."""
    version = libc.syscall(ctypes.c_long(LANDLOCK_CREATE), None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise WallError("this kernel has no Landlock, or it is switched off (see the boot option lsm=)")
    handled = RIGHTS_BY_VERSION[min(version, 5)]
    attributes = struct.pack("QQQ", handled, 3, 3)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = call(
        "syscall",
        ctypes.c_long(LANDLOCK_CREATE),
        attributes,
        ctypes.c_size_t(len(attributes)),
        0,
        label="landlock_create_ruleset",
    )
    for path in [*read, "/tmp"]:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if path == "/tmp":
            rights = TMP_RIGHTS
        elif path.startswith("/dev/"):
            rights = READ_FILE | WRITE_FILE
        else:
            rights = READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE
        rule = struct.pack("=Qi", rights & handled, opened)
        call("syscall", ctypes.c_long(LANDLOCK_ADD), rules, 1, rule, 0, label=f"landlock_add_rule {path}")
        os.close(opened)
    call("syscall", ctypes.c_long(LANDLOCK_RESTRICT), rules, 0, label="landlock_restrict_self")
    os.close(rules)


def install_filter(instructions: bytes) -> None:
    """Installs the seccomp filter for this process and every thread that it starts."""
    held = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("HxxxxxxP", len(instructions) // 8, ctypes.addressof(held))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0, label="seccomp")


def call(name: str, *arguments: object, label: str = "") -> int:
    """Calls a function of the C library; raises a WallError that names the function and the reason if it fails."""
    result = getattr(libc, name)(*arguments)
    if result == -1:
        raise WallError(f"{label or name}: {os.strerror(ctypes.get_errno())}")
    return result


if "REQUEST" in globals():  # set by who starts this file; importing it does nothing
    main(globals()["REQUEST"])
