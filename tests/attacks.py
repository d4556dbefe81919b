"""Programs that attack what runs them: the host (`ON_HOST`) and whoever grades them (`ON_GRADER`).

A program in `ON_HOST` prints PWNED where its attack had the effect that it was after; the words between @ are facts of
the host that `test_attacks.py` sets up, so that there is something to hit. Where `bare` is set, the attack harms
nothing, and the tests show that it works against a program that runs without walls.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attack:
    """A program; for how many seconds it may go on; whether it is tried without walls as well."""

    program: str
    seconds: float = 10.0
    bare: bool = False


# System calls by number, so that nothing but the kernel can say no. `call` returns the result, or -errno.
SYSTEM_CALLS = """
import ctypes, os, platform
X86 = platform.machine() == "x86_64"
libc = ctypes.CDLL(None, use_errno=True)
def call(x86, arm, *arguments):
    number = x86 if X86 else arm
    if number is None:
        return -38
    result = libc.syscall(ctypes.c_long(number), *arguments)
    return -ctypes.get_errno() if result == -1 else result
"""

ON_HOST: dict[str, Attack] = {
    # --- using everything up ---
    "fork_bomb": Attack("import os\nfor _ in range(500):\n    if os.fork() == 0:\n        print('PWNED', flush=True)"),
    "fork_by_number": Attack(
        SYSTEM_CALLS + "if call(57, None) >= 0 or call(58, None) >= 0: print('PWNED', flush=True)"
    ),
    "clone_by_number": Attack(
        SYSTEM_CALLS + "if call(56, 220, 17, 0, 0, 0, 0) >= 0: print('PWNED', flush=True)", bare=True
    ),
    "thread_bomb": Attack(
        """
import threading, time
threading.stack_size(1 << 16)
n = 0
try:
    for n in range(400):
        threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
except RuntimeError:
    pass
if n > 200: print("PWNED")
""",
        bare=True,
    ),
    "memory_bomb": Attack("x = bytearray(3 << 30)\nx[::4096] = x[::4096]\nprint('PWNED')"),
    "memory_bomb_in_small_pieces": Attack(
        "x = []\nwhile True:\n    x.append(bytearray(1 << 20))\n    if len(x) > 1000: print('PWNED', flush=True)"
    ),
    "memory_bomb_that_catches": Attack(
        """
x, failed = [], 0
while failed < 50:
    try: x.append(bytes(8 << 20))
    except MemoryError: failed += 1
print("PWNED" if len(x) > 100 else "contained")
"""
    ),
    "memory_bomb_in_shared_maps": Attack(
        "import mmap\nx = [mmap.mmap(-1, 64 << 20) for _ in range(16)]\nfor m in x: m.write(b'x' * (64 << 20))\n"
        "print('PWNED')"
    ),
    "memory_in_memfd": Attack(
        "import os\nfd = os.memfd_create('x')\nos.write(fd, b'x' * 1024)\nprint('PWNED')", bare=True
    ),
    "memory_in_system_v": Attack(SYSTEM_CALLS + "if call(29, 194, 0, 1 << 20, 0o1600) >= 0: print('PWNED')"),
    "memory_in_pipes": Attack(
        """
import os
total = 0
try:
    while True:
        r, w = os.pipe()
        os.set_blocking(w, False)
        total += os.write(w, b"x" * (1 << 16))
except OSError:
    print("PWNED" if total > 64 << 20 else "contained")
"""
    ),
    "disk_bomb": Attack(
        """
total = 0
for n in range(1000):
    try:
        with open(f"/tmp/{n}", "wb") as file:
            for _ in range(1000):
                file.write(b"x" * (1 << 20))
                file.flush()
                total += 1
    except OSError:
        pass
    if total > 128: print("PWNED", flush=True); break
"""
    ),
    "sparse_disk_bomb": Attack("import os\nos.truncate(open('/tmp/x', 'wb').fileno(), 1 << 40)\nprint('PWNED')"),
    "inode_bomb": Attack(
        """
n = 0
try:
    for n in range(100_000): open(f"/tmp/{n}", "w").close()
except OSError: pass
if n > 10_000: print("PWNED")
"""
    ),
    "folder_bomb": Attack(
        "import os\nfor n in range(100_000):\n    os.mkdir('x'); os.chdir('x')\n"
        "    if n > 10_000: print('PWNED'); break"
    ),
    "raised_limits": Attack(
        """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
    try: resource.setrlimit(kind, (1 << 40, 1 << 40)); print("PWNED")
    except (ValueError, OSError): pass
"""
    ),
    "endless_output": Attack("while True: print('x' * 10_000)"),
    "endless_errors": Attack("import sys\nwhile True: sys.stderr.write('x' * 10_000)"),
    "endless_loop": Attack("while True: pass", seconds=0.5),
    "endless_sleep": Attack("import time\ntime.sleep(1e6)", seconds=0.5),
    "deaf_to_signals": Attack(
        """
import signal, time
for number in signal.valid_signals():
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(0.1)
""",
        seconds=0.5,
    ),
    "stopped_by_itself": Attack("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nsignal.pause()", seconds=0.5),
    "regular_expression_bomb": Attack("import re\nre.match(r'(a|a)*$', 'a' * 60 + 'b')", seconds=0.5),
    "number_bomb": Attack(
        "import sys\nsys.set_int_max_str_digits(0)\nprint(10 ** 10 ** 9)\nprint('PWNED')", seconds=0.5
    ),
    "zip_bomb": Attack(
        """
import zlib
packer = zlib.compressobj(1)
small = b"".join(packer.compress(bytes(1 << 20)) for _ in range(600)) + packer.flush()
print("PWNED" if len(zlib.decompress(small)) > 1 << 29 else "")
""",
        seconds=4,
    ),
    "pickle_bomb": Attack(
        """
import pickle, os
class Bomb:
    def __reduce__(self): return os.system, ("touch @VICTIM_FOLDER@/pickled",)
pickle.loads(pickle.dumps(Bomb()))
print("PWNED" if os.path.exists("@VICTIM_FOLDER@/pickled") else "")
""",
        bare=True,
    ),
    "deep_recursion": Attack("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f([x])\nf(0)", seconds=1),
    "deep_recursion_in_c": Attack(
        "x = []\nfor _ in range(10 ** 6): x = [x]\nimport sys\nsys.setrecursionlimit(10 ** 9)\nrepr(x)", seconds=1
    ),
    "segmentation_fault": Attack("import ctypes\nctypes.string_at(0)\nprint('PWNED')"),
    "compiler_bomb": Attack("(" * 90_000 + ")" * 90_000),
    # --- outliving ---
    "daemon": Attack(
        """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1)
        open("@VICTIM_FOLDER@/outlived", "w").close()
        print("PWNED", flush=True)
"""
    ),
    "thread_after_the_end": Attack(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1e6,)).start()", seconds=0.5
    ),
    "work_at_exit": Attack("import atexit, time\natexit.register(time.sleep, 1e6)", seconds=0.5),
    "spawned_program": Attack(
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'print(\"PWNED\")']).wait()", bare=True
    ),
    "shell": Attack("import os\nif os.system('exit 0') == 0: print('PWNED')", bare=True),
    "spawned_by_posix": Attack(
        "import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'echo PWNED'], {})\nos.wait()", bare=True
    ),
    "executed_itself": Attack(
        "import os, sys\nos.execv(sys.executable, ['python', '-c', 'print(\"PWNED\")'])", bare=True
    ),
    "executed_memory": Attack(
        SYSTEM_CALLS
        + """
fd = call(319, 279, b"x", 0)
if fd >= 0 and os.path.exists("/bin/echo"):
    os.write(fd, open("/bin/echo", "rb").read())
    words = (ctypes.c_char_p * 3)(b"echo", b"PWNED", None)
    call(322, 281, fd, b"", words, None, 0x1000)
""",
        bare=True,
    ),
    "executed_own_file": Attack(
        "import os\nopen('x', 'w').write('#!/bin/sh\\necho PWNED')\nos.chmod('x', 0o755)\nos.execv('./x', ['x'])",
        bare=True,
    ),
    # --- other processes ---
    "kill_the_parent": Attack("import os\nos.kill(os.getppid(), 9)\nos.getppid() and print('PWNED')"),
    "kill_everything": Attack("import os\nos.kill(-1, 9)"),
    "kill_by_number": Attack("import os\nos.kill(@VICTIM@, 0)\nos.kill(@VICTIM@, 9)\nprint('PWNED')"),
    "kill_a_group": Attack("import os\nos.killpg(@VICTIM@, 9)\nprint('PWNED')"),
    "other_process_by_descriptor": Attack("import os\nos.pidfd_open(@VICTIM@)\nprint('PWNED')", bare=True),
    "ptrace": Attack(SYSTEM_CALLS + "if call(101, 117, 16, @VICTIM@, 0, 0) >= 0: print('PWNED')"),
    "ptrace_itself": Attack(SYSTEM_CALLS + "if call(101, 117, 0, 0, 0, 0) >= 0: print('PWNED')", bare=True),
    "memory_of_another_process": Attack(
        SYSTEM_CALLS
        + """
there, here = (ctypes.c_size_t * 2)(@ADDRESS@, 8), ctypes.create_string_buffer(8)
mine = (ctypes.c_size_t * 2)(ctypes.addressof(here), 8)
if call(310, 270, @VICTIM@, mine, 1, there, 1, 0) == 8: print("PWNED")
""",
        bare=True,
    ),
    "priorities_of_others": Attack("import os\nos.getpriority(os.PRIO_PROCESS, @VICTIM@)\nprint('PWNED')", bare=True),
    # --- reading ---
    "secret_file": Attack("print(open('@SECRET_FILE@').read(), 'PWNED')", bare=True),
    "environment": Attack(
        """
import ctypes, os
found = str(dict(os.environ))
table, n = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ"), 0
while table and table[n]: found, n = found + str(table[n]), n + 1
for who in ("self", "1", "@PARENT@", "@VICTIM@", os.getppid()):
    try: found += open(f"/proc/{who}/environ").read()
    except OSError: pass
print(found, "PWNED" if "@VARIABLE@" in found else "")
""",
        bare=True,
    ),
    "proc": Attack(
        """
import os
for path in ("/proc/1/maps", "/proc/self/mem", "/proc/self/maps", "/proc/@PARENT@/cmdline", "/proc/version", "/proc",
             "/sys", "/sys/fs/cgroup", "/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/tty", "/dev/shm", "/run", "/var"):
    try: os.open(path, os.O_RDONLY); print("PWNED", path)
    except OSError: pass
""",
        bare=True,
    ),
    "users_of_this_machine": Attack(
        "for p in ('/etc/passwd', '/etc/shadow', '/etc/hostname', '/etc/hosts'):\n    print(open(p).read(), 'PWNED')",
        bare=True,
    ),
    "repository": Attack("import os\nprint(os.listdir('@REPOSITORY@'), 'PWNED')", bare=True),
    "repository_by_file": Attack("print(open('@REPOSITORY@/pyproject.toml').read(), 'PWNED')", bare=True),
    "homes_and_keys": Attack(
        """
import glob, os
for path in ("/root", "/home", "~", "/" + "root/.ssh", "~/.ssh/id_rsa", "~/.cache", "@HOME@"):
    for found in (path, *glob.glob(path + "/*")):
        try: os.listdir(os.path.expanduser(found)); print("PWNED", found)
        except OSError: pass
""",
        bare=True,
    ),
    "what_others_left": Attack(
        """
import os
if os.listdir("/tmp"): print("PWNED", os.listdir("/tmp"))
open("/tmp/left", "w").write("x")
os.mkdir("/tmp/folder")
"""
    ),
    "open_descriptors": Attack(
        """
import os
for fd in range(3, 1024):
    try: os.fstat(fd); print("PWNED", fd)
    except OSError: pass
"""
    ),
    "input_that_can_be_written": Attack(
        """
import os
for act in (lambda: os.write(0, b"x"), lambda: os.ftruncate(0, 1 << 30), lambda: os.fchmod(0, 0o777)):
    try: act(); print("PWNED" if act.__code__.co_names[1] != "fchmod" else "")
    except OSError: pass
"""
    ),
    "frames_and_objects": Attack(
        """
import gc, sys
frame = sys._getframe()
while frame:
    print(str(frame.f_globals)[:200_000], str(frame.f_locals)[:200_000])
    frame = frame.f_back
for o in gc.get_objects():
    if isinstance(o, (dict, list, tuple)): print(repr(o)[:300])
""",
        seconds=20,
    ),
    # --- the network ---
    "tcp": Attack("import socket\nsocket.create_connection(('127.0.0.1', @PORT@), 3)\nprint('PWNED')", bare=True),
    "udp": Attack(
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.sendto(b'x', ('127.0.0.1', @PORT@))\n"
        "print('PWNED')",
        bare=True,
    ),
    "listener": Attack(
        "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\nprint('PWNED')", bare=True
    ),
    "unix_socket": Attack("import socket\nsocket.socket(socket.AF_UNIX).connect('@UNIX@')\nprint('PWNED')", bare=True),
    "abstract_socket": Attack(
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0@ABSTRACT@')\nprint('PWNED')", bare=True
    ),
    "strange_sockets": Attack(
        """
import socket
for family, kind, protocol in ((16, 3, 0), (17, 3, 768), (2, 3, 1), (10, 1, 0), (38, 5, 0), (40, 1, 0), (1, 2, 0)):
    try: socket.socket(family, kind, protocol); print("PWNED", family)
    except OSError: pass
""",
        bare=True,
    ),
    "pair_of_sockets_of_the_network": Attack(SYSTEM_CALLS + "print(call(53, 199, 30, 1, 0, (ctypes.c_int * 2)()))"),
    "names": Attack("import socket\nprint(socket.getaddrinfo('example.com', 80), 'PWNED')"),
    # --- writing ---
    "written_outside": Attack(
        """
import os
for path in ("@VICTIM_FOLDER@/written", "/written", "/usr/lib/written", "/etc/written", "/dev/shm/written", "/dev/x",
             "/tmp/../written", os.path.dirname(os.__file__) + "/written.py"):
    try: open(path, "w").write("x"); print("PWNED", path)
    except OSError: pass
"""
    ),
    "standard_library": Attack(
        """
import json, os, sys
for path in (json.__file__, os.__file__, sys.executable, json.__cached__):
    for act in (lambda: open(path, "a").write("#"), lambda: os.chmod(path, 0o777), lambda: os.remove(path),
                lambda: os.utime(path), lambda: os.rename(path, path + "x"), lambda: os.truncate(path, 0)):
        try: act(); print("PWNED", path)
        except OSError: pass
"""
    ),
    "symbolic_links": Attack(
        """
import os
for n, path in enumerate(("@SECRET_FILE@", "/proc/1/root@SECRET_FILE@", "../../../..@SECRET_FILE@", "/proc/self/exe")):
    try: os.symlink(path, f"{n}"); print(open(f"{n}", "rb").read(100), "PWNED")
    except OSError: pass
""",
        bare=True,
    ),
    "hard_links": Attack(
        """
import os
for path in ("@SECRET_FILE@", os.__file__, "/dev/null", "/usr/lib/os-release"):
    try: os.link(path, "/tmp/linked"); os.chmod("/tmp/linked", 0o777); print("PWNED")
    except OSError: pass
"""
    ),
    "proc_self": Attack(
        "import os\nfor p in ('/proc/self/exe', '/proc/self/fd/0', '/proc/self/root', '/proc/self/cwd'):\n"
        "    try: print(os.readlink(p), 'PWNED')\n    except OSError: pass",
        bare=True,
    ),
    "device_nodes": Attack(
        "import os, stat\nos.mknod('/tmp/d', 0o666 | stat.S_IFBLK, os.makedev(254, 0))\nprint('PWNED')"
    ),
    # --- the kernel ---
    "mounts": Attack(
        SYSTEM_CALLS
        + """
for got in (call(165, 40, b"x", b"/tmp", b"tmpfs", 0, None), call(165, 40, b"x", b"/tmp", b"proc", 0, None),
            call(165, 40, b"none", b"/", None, 32 | 4096, None), call(166, 39, b"/tmp", 2), call(430, 430, b"tmpfs", 0),
            call(155, 41, b".", b"."), call(442, 442, -100, b"/", 0, (ctypes.c_uint64 * 4)(0, 1, 0, 0), 32)):
    if got >= 0: print("PWNED")
"""
    ),
    "namespaces": Attack(
        SYSTEM_CALLS
        + """
for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000):
    if call(272, 97, flag) >= 0 or call(56, 220, flag | 17, 0, 0, 0, 0) >= 0: print("PWNED", flush=True)
arguments = (ctypes.c_uint64 * 11)(0x10000000, *[0] * 10)
if call(435, 435, arguments, 88) >= 0: print("PWNED", flush=True)
"""
    ),
    "escape_from_the_root_folder": Attack(
        """
import os
try: os.mkdir("/tmp/x"); os.chroot("/tmp/x"); print("PWNED")
except OSError: pass
for _ in range(50): os.chdir("..")
try: print(os.listdir(), "PWNED")
except OSError: pass
"""
    ),
    "becoming_root": Attack(
        SYSTEM_CALLS
        + """
for act in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgid(0), lambda: os.setgroups([0])):
    try: act(); print("PWNED")
    except OSError: pass
header, all_ = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
if call(126, 91, header, all_) >= 0 or libc.prctl(47, 2, 21, 0, 0) == 0: print("PWNED")
if 0 in os.getresuid() or 0 in os.getresgid() or 0 in os.getgroups(): print("PWNED")
"""
    ),
    "keys": Attack(
        SYSTEM_CALLS
        + "if call(250, 219, 0, -3, 1) >= 0 or call(248, 217, b'user', b'x', b'y', 1, -3) >= 0: print('PWNED')",
        bare=True,
    ),
    "performance_counters_and_bpf": Attack(
        SYSTEM_CALLS
        + """
event = (ctypes.c_uint32 * 32)(1, 128, 1)
if call(298, 241, event, 0, -1, -1, 0) >= 0: print("PWNED")
if call(321, 280, 0, (ctypes.c_uint32 * 32)(2, 4, 4, 1), 128) >= 0: print("PWNED")
""",
        bare=True,
    ),
    "io_uring": Attack(SYSTEM_CALLS + "if call(425, 425, 8, (ctypes.c_uint32 * 30)()) >= 0: print('PWNED')", bare=True),
    "userfaultfd": Attack(SYSTEM_CALLS + "if call(323, 282, 1) >= 0: print('PWNED')", bare=True),
    "kernel_modules_and_reboot": Attack(
        SYSTEM_CALLS
        + """
for got in (call(175, 105, b"x", 1, b""), call(313, 273, 0, b"", 0), call(246, 104, 0, 0, 0, 0),
            call(169, 142, 0xFEE1DEAD, 672274793, 0, 0), call(227, 112, 0, (ctypes.c_int64 * 2)(1, 1)),
            call(170, 161, b"pwned", 5), call(103, 116, 3, ctypes.create_string_buffer(100), 100)):
    if got != -1: print("PWNED", got)
"""
    ),
    "file_handles": Attack(
        SYSTEM_CALLS
        + """
handle = ctypes.create_string_buffer((128).to_bytes(4, "little"), 256)
if call(303, 264, -100, b"/usr/lib", handle, ctypes.byref(ctypes.c_int()), 0) >= 0: print("PWNED")
""",
        bare=True,
    ),
    "calls_of_other_architectures": Attack(
        SYSTEM_CALLS
        + """
import mmap
if call(0x40000000 + 39, None) >= 0: print("PWNED")
if X86:
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(bytes.fromhex("53b814000000cd805bc3"))  # getpid by the 32-bit gate
    run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    if run() > 0: print("PWNED", flush=True)
"""
    ),
}

# Programs that want a point without solving the task: f(3) is a number that nothing in the jail says.
ON_GRADER: dict[str, str] = {
    "exit_early": "import sys\nprint('passed')\nsys.exit(0)",
    "exit_hard": "import os\nos.write(1, b'passed')\nos._exit(0)",
    "exit_when_called": "import sys\ndef f(x): sys.exit(0)",
    "exit_hard_when_called": "import os\ndef f(x): os._exit(0)",
    "exit_at_exit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "kill_itself": "import os\ndef f(x): os.kill(os.getpid(), 9)",
    "equal_to_everything": """
class Liar:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __contains__ = __lt__
    def __bool__(self): return True
    def __abs__(self): return 0
    def __sub__(self, other): return self
    __rsub__ = __add__ = __radd__ = __sub__
    def __hash__(self): return 918273
def f(x): return Liar()
""",
    "number_that_lies": """
class Liar(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __sub__(self, other): return 0
    __rsub__ = __sub__
def f(x): return Liar(1)
""",
    "list_that_lies": "class Liar(list):\n    def __eq__(self, other): return True\ndef f(x): return Liar()",
    "type_that_lies": "class Meta(type):\n    def __eq__(self, other): return True\n"
    "class L(metaclass=Meta): pass\ndef f(x): return L",
    "pickled_liar": "class L:\n    def __reduce__(self): return eval, ('918273',)\ndef f(x): return L()",
    "not_a_number": "def f(x): return float('nan')",
    "infinity": "def f(x): return float('inf')",
    "patched_builtins": """
import builtins
builtins.isinstance = builtins.all = builtins.any = lambda *a: True
builtins.type = lambda *a: int
builtins.abs = lambda x: 0
builtins.__build_class__ = builtins.len = lambda *a: 0
def f(x): return 0
""",
    "patched_json": """
import json
json.dumps = lambda *a, **k: '{"value": true, "passed": true}'
json.loads = lambda *a, **k: {"name": "f", "object": None, "args": [], "kwargs": {"dict": []}, "value": True}
def f(*x): return 0
""",
    "patched_driver": """
import sys
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_globals.items()):
        if callable(value) and name in ("encode", "decode", "check", "_answer", "call", "supervise"):
            frame.f_globals[name] = lambda *a: True
    frame = frame.f_back
def f(x): return 0
""",
    "patched_comparison": "import math\nmath.isclose = math.fabs = lambda *a, **k: True\ndef f(x): return 0",
    "imported_grader": """
try:
    from hybridflow.rewards.verifiable import code
    code.same_value = code.same_output = lambda *a: True
    code.score = lambda *a, **k: {"score": 1.0}
except ImportError: pass
def f(x): return 0
""",
    "forged_protocol": """
import os
for fd in range(1, 64):
    for line in (b"passed", b"ended exited 0 0 0 0", b'{"value": true}\\n', b'{"passed": true}\\n'):
        try: os.write(fd, line)
        except OSError: pass
def f(x): return 0
""",
    "many_answers": """
import os
for n in range(2000):
    for fd in (4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16):
        try: os.write(fd, b'{"value": %d}\\n' % n)
        except OSError: pass
def f(x): return 0
""",
    "looked_for_in_memory": """
import gc, sys
held = [c if type(c) in (list, tuple) else c.values() if type(c) is dict else () for c in gc.get_objects()]
found = [o for c in held for o in list(c) if type(o) is int and 900_000 < o < 1_000_000]
frame = sys._getframe()
while frame:
    found += [o for d in (frame.f_locals, frame.f_globals) for o in list(d.values()) if type(o) is int and o > 900_000]
    found += [int(w) for w in str(frame.f_locals).replace("=", " ").split() if w.isdigit() and len(w) == 6]
    frame = frame.f_back
print(*found)
def f(x): return found[0] if len(found) == 1 else found
""",
    "looked_for_in_descriptors": """
import os, re
text = b""
for fd in (0, *range(3, 64)):
    try:
        os.set_blocking(fd, False)
        text += os.read(fd, 1 << 20)
    except OSError: pass
found = re.findall(rb"\\d{6}", text)
print(*found)
def f(x): return int(found[0])
""",
    "tests_in_its_name": "def check(candidate): pass\nclass StandIn: pass\nassert_ = check\ndef f(x): return check",
    "raises_what_is_wanted": "def f(x): raise AssertionError('passed')",
    "raises_the_end": "def f(x): raise StopIteration",
    "generator": "def f(x):\n    n = 0\n    while True: yield n",
    "itself": "def f(x): return f",
    "argument": "def f(x): return x",
    "everything": "def f(x): return list(range(10_000))",
    "nothing": "def f(x): pass",
    "nested_too_deeply": "def f(x):\n    r = []\n    for _ in range(100_000): r = [r]\n    return r",
    "endless_number": "def f(x): return 10 ** 100_000",
    "flood_of_replies": "def f(x): return 'x' * 5_000_000",
    "broken_replies": """
import os
for fd in range(3, 20):
    try: os.write(fd, b'{"value": {"tuple": 3, "float": []}}\\n[[[[\\n\\xff\\xfe\\n' + b"[" * 100_000 + b"\\n")
    except OSError: pass
def f(x): return 0
""",
}
