"""The system calls that a program may not make, as the classic BPF that the kernel reads. seccomp(2), bpf(4).

The filter is the innermost wall. What is denied, and why:

- becoming another program or another process (execve, fork): a program is one process with threads, so that its memory
  limit is a limit on all of it, and there is nothing that could outlive it;
- sockets of every kind, except a connected pair of its own (asyncio wakes itself up with one);
- what reaches into other processes or into the kernel (ptrace, process_vm_readv, bpf, perf, io_uring, userfaultfd,
  keys, modules, mounts, namespaces);
- memory that no limit counts (memfd, System V and POSIX message queues and shared memory).

A denied call fails with EPERM; one that is newer than the table, and clone3, whose flags cannot be read here, with
ENOSYS, at which the C library falls back to clone.
"""

from __future__ import annotations

import struct

# name: (x86_64, aarch64); None: does not exist there. From the kernel's unistd.h.
DENIED: dict[str, tuple[int | None, int | None]] = {
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, None),
    "vfork": (58, None),
    "unshare": (272, 97),
    "setns": (308, 268),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "create_module": (174, None),
    "query_module": (178, None),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "semget": (64, 190),
    "semop": (65, 193),
    "mq_open": (240, 180),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "personality": (135, 92),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
    "_sysctl": (156, None),
    "nfsservctl": (180, 42),
    "lookup_dcookie": (212, 18),
    "vhangup": (153, 58),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "move_pages": (279, 239),
    "mbind": (237, 235),
    "migrate_pages": (256, 238),
    "vmsplice": (278, 75),
    "mknod": (133, None),
    "mknodat": (259, 33),
}
LAST_KNOWN = 450
CLONE, CLONE3, SOCKETPAIR = (56, 220), 435, (53, 199)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH_*

_CLONE_THREAD, _CLONE_NAMESPACES = 0x00010000, 0x7E020000
_AF_UNIX = 1
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # SECCOMP_RET_*, with an errno
_LOAD, _AND, _EQUAL, _GREATER, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the low half of the argument


def build(machine: str) -> bytes | None:
    """Builds the filter for a processor as `os.uname().machine` names it, 8 bytes per instruction; None where there is
    none.

    >>> len(build("x86_64")) % 8, build("riscv64")
    (0, None)
    """
    if machine not in ARCHITECTURES:
        return None
    column, architecture = ARCHITECTURES[machine]
    lines: list[bytes] = []

    def add(code: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        lines.append(struct.pack("HBBI", code, if_true, if_false, value))

    add(_LOAD, _ARCHITECTURE)
    add(_EQUAL, architecture, 1, 0)
    add(_RETURN, _KILL)  # 32-bit calls have other numbers
    add(_LOAD, _NUMBER)
    add(_GREATER, LAST_KNOWN, 0, 1)  # also every call of the x32 interface, whose numbers begin at 2 ** 30
    add(_RETURN, _ENOSYS)
    add(_EQUAL, CLONE3, 0, 1)
    add(_RETURN, _ENOSYS)
    for numbers in DENIED.values():
        number = numbers[column]
        if number is not None:
            add(_EQUAL, number, 0, 1)
            add(_RETURN, _EPERM)
    add(_EQUAL, CLONE[column], 0, 5)  # a thread, and nothing else that clone makes
    add(_LOAD, _FIRST_ARGUMENT)
    add(_AND, _CLONE_NAMESPACES | _CLONE_THREAD)
    add(_EQUAL, _CLONE_THREAD, 0, 1)
    add(_RETURN, _ALLOW)
    add(_RETURN, _EPERM)
    add(_EQUAL, SOCKETPAIR[column], 0, 3)
    add(_LOAD, _FIRST_ARGUMENT)
    add(_EQUAL, _AF_UNIX, 1, 0)
    add(_RETURN, _EPERM)
    add(_RETURN, _ALLOW)
    return b"".join(lines)
