"""Where programs run: as root and as nobody, with and without bubblewrap, refused where there are no walls, remote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hybridflow.errors import UserError
from hybridflow.rewards.sandbox import bubblewrap, seccomp
from hybridflow.rewards.sandbox.fusion import FusionSandbox
from hybridflow.rewards.sandbox.local import LocalSandbox
from hybridflow.rewards.sandbox.open import open_sandbox
from hybridflow.rewards.sandbox.outcome import Limits, SandboxError
from hybridflow.rewards.sandbox.view import interpreter, view
from hybridflow.rewards.verifiable.code import score

SOURCE = Path(__file__).parents[3] / "src"
LIMITS = Limits(10, 512, 64)

# What a process without torch or pytest does: three programs and an attack, and says what came of it.
WORK = """
import json, os, sys
from hybridflow.rewards.sandbox.local import LocalSandbox
from hybridflow.rewards.sandbox.outcome import Limits
s = LocalSandbox(sys.argv[1], Limits(10, 512, 64), 2)
inside = s.run("import os\\nprint(os.getuid(), os.getgroups(), os.path.exists('/proc'))", "")
fork = s.run("import os\\nos.fork()\\nprint('PWNED')", "")
slow = LocalSandbox(sys.argv[1], Limits(0.5, 512, 64), 2).run("while True: pass", "")
call = s.call("def f(x): return x + 1", "f", [1])
check = s.check("def f(x): return x + 1", "assert f(1) == 2")
print(json.dumps([os.getuid(), inside.stdout, inside.stderr, fork.stdout, slow.status, call.result, check.status]))
"""


def as_nobody(walls: str, *options: str) -> list[Any]:
    """What `WORK` says, as uid 65534 without a privilege, from places that everybody may read."""
    folder = Path(tempfile.mkdtemp(prefix="nobody-"))
    try:
        folder.chmod(0o755)
        python, source = folder / "python", folder / "src"
        prefix = Path(interpreter()).parents[1]
        for made in (python, source):
            made.mkdir()
        script = (
            f"mount --bind {prefix} {python} && mount --bind {SOURCE} {source} && "
            f"exec setpriv {' '.join(options) or '--reuid 65534 --regid 65534 --clear-groups'} "
            f'"$@" {python}/bin/{Path(interpreter()).name} -S -c "$WORK" {walls}'
        )
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "sh"],
            env=os.environ | {"WORK": WORK, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    finally:
        shutil.rmtree(folder)


GOOD = ["65534 [] False\n", "", "", "timeout", '{"value": 2}\n', "ok"]


def test_an_ordinary_user_has_the_same_walls() -> None:
    assert as_nobody("local") == [65534, *GOOD]


def test_root_of_a_container_that_may_not_mount_has_them_as_well() -> None:
    user, *rest = as_nobody("local", "--bounding-set", "-sys_admin")
    assert (user, rest) == (0, GOOD)


def test_a_limited_process_that_ignores_signals_starts_clean_jails() -> None:
    limited = (
        "import resource, signal, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "[signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU)]\n"
        "from hybridflow.rewards.sandbox.local import LocalSandbox\n"
        "from hybridflow.rewards.sandbox.outcome import Limits\n"
        "program = 'import signal, resource\\nprint(signal.getsignal(2).__name__, signal.getsignal(15) == 0, '"
        "'resource.getrlimit(resource.RLIMIT_AS)[0] >> 20)'\n"
        "print(LocalSandbox('local', Limits(10, 512, 64), 1).run(program, ''))"
    )
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=True)
    assert "default_int_handler True 512" in done.stdout


def test_without_walls_programs_are_refused_unless_the_user_insists() -> None:
    refused = (
        "from hybridflow.rewards.sandbox.open import open_sandbox\n"
        "from hybridflow.errors import UserError\n"
        "try: open_sandbox({'backend': 'local'})\n"
        "except UserError as error: print(error)\n"
        "print(open_sandbox({'backend': 'unsafe'}).run('print(6 * 7)', '').stdout)"
    )
    powerless = ["setpriv", "--bounding-set", "-sys_admin,-setuid,-setgid"]
    done = subprocess.run([*powerless, sys.executable, "-c", refused], capture_output=True, text=True, check=True)
    first, why, fix, insisted = done.stdout.strip().split("\n", 3)
    assert first == "programs that a model wrote cannot be contained on this machine"
    assert why == "  why: the jail failed: this root may not become another user: Operation not permitted"
    assert "reward.sandbox.backend=fusion" in fix and "reward.sandbox.backend=unsafe" in fix
    assert insisted == "42"


def test_a_wall_that_cannot_be_built_is_never_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "ARCHITECTURES", {})
    with pytest.raises(SandboxError, match="there is no seccomp filter for"):
        LocalSandbox("local", LIMITS, 1).run("print(1)", "")


def test_jails_end_with_whoever_started_them(tmp_path: Path) -> None:
    parent = (
        "from hybridflow.rewards.sandbox.local import LocalSandbox\n"
        "from hybridflow.rewards.sandbox.outcome import Limits\n"
        "print('begun', flush=True)\n"
        "LocalSandbox('local', Limits(600, 512, 64), 1).run('import time\\nprint(1, flush=True)\\ntime.sleep(600)', '')"
    )
    started = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert started.stdout is not None and started.stdout.readline() == b"begun\n"
    jails: set[str] = set()
    while len(jails) < 2:  # the supervisor, and the program that it has forked
        jails |= _below(str(started.pid), *jails)
    started.kill()
    started.wait()
    waited = threading.Event()
    for _ in range(600):
        if not any(_running(pid) for pid in jails):
            break
        waited.wait(0.1)
    assert [pid for pid in jails if _running(pid)] == []


def _below(*parents: str) -> set[str]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if stat.read_text().rsplit(")", 1)[1].split()[1] in parents:
                found.add(stat.parent.name)
        except OSError:  # ended meanwhile
            continue
    return found


def _running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_filter_knows_the_calls_by_their_numbers() -> None:
    for machine, header, column in (("x86_64", "x86_64-linux-gnu/asm/unistd_64.h", 0), ("", "asm-generic/unistd.h", 1)):
        path = Path("/usr/include") / header
        if not path.exists():  # no C headers here
            continue
        numbers = dict(line.split()[1:3] for line in path.read_text().splitlines() if line.startswith("#define __NR"))
        for name, known in (seccomp.DENIED | {"clone": seccomp.CLONE, "socketpair": seccomp.SOCKETPAIR}).items():
            for prefix in ("__NR_", "__NR3264_"):
                if prefix + name in numbers and numbers[prefix + name].isdigit():
                    assert known[column] == int(numbers[prefix + name]), (machine, name)
    assert seccomp.build("x86_64") != seccomp.build("aarch64") and seccomp.build("ppc64le") is None


def test_programs_see_nothing_of_this_library() -> None:
    assert not any(str(SOURCE).startswith(path + "/") for path in view()["read"])
    outcome = LocalSandbox("local", LIMITS, 1).run("import hybridflow", "")
    assert outcome.status == "error" and "No module named 'hybridflow'" in outcome.stderr
    assert LocalSandbox("local", LIMITS, 1).run("import numpy", "").status == "error"


def test_bubblewrap_is_told_the_same_view() -> None:
    shown = {"read": ["/usr/lib", "/dev/null"], "hide": ["/usr/lib/x"], "links": [("/lib", "usr/lib")], "tmp_bytes": 5}
    command = " ".join(bubblewrap.command("bwrap", shown, "/opt/bin/python", privileged=False))
    for part in (
        "--ro-bind /usr/lib /usr/lib",
        "--dev-bind /dev/null /dev/null",
        "--tmpfs /usr/lib/x",
        "--symlink usr/lib /lib",
        "--size 5 --tmpfs /tmp",
        "--remount-ro /",
        "--unshare-net",
        "--unshare-user --uid 65534",
    ):
        assert part in command, part


@pytest.mark.skipif(bubblewrap.installed() is None, reason="bwrap is not installed")
def test_bubblewrap_holds_programs_too() -> None:
    sandbox = LocalSandbox("bubblewrap", LIMITS, 1)
    outcome = sandbox.run("import os\nprint(os.getuid(), os.listdir('/tmp'), os.path.exists('/proc'))", "")
    assert outcome.stdout == "65534 [] False\n", outcome
    assert sandbox.run("import os\nos.fork()\nprint('PWNED')", "").status == "error"
    assert LocalSandbox("bubblewrap", Limits(0.5, 512, 64), 1).run("while True: pass", "").status == "timeout"
    assert sandbox.check("def f(x): return x + 1", "assert f(1) == 2").status == "ok"


# --- a server ---


class Fusion(BaseHTTPRequestHandler):
    """Sandbox Fusion's /run_code as it is documented, with a bare subprocess behind it; some answers are wrong."""

    seen: list[dict[str, Any]] = []  # noqa: RUF012
    answers: list[tuple[int, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/run_code" and asked["language"] == "python"
        self.seen.append(asked)
        status, reply = self.answers.pop(0) if self.answers else (200, self.execute(asked))
        body = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def execute(self, asked: dict[str, Any]) -> dict[str, Any]:
        try:
            done = subprocess.run(
                [sys.executable, "-S", "-c", asked["code"]],
                input=asked["stdin"],
                capture_output=True,
                text=True,
                check=False,
                timeout=asked["run_timeout"],
            )
        except subprocess.TimeoutExpired:
            result = {"status": "TimeLimitExceeded", "stdout": "", "stderr": "", "return_code": None}
            return {"status": "Failed", "message": "", "run_result": result}
        result = {"status": "Finished", "stdout": done.stdout, "stderr": done.stderr, "return_code": done.returncode}
        return {"status": "Failed" if done.returncode else "Success", "message": "", "run_result": result}

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Fusion.seen, Fusion.answers = [], []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Fusion)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_a_sandbox_fusion_server_runs_programs(server: str) -> None:
    settings = {"backend": "fusion", "url": server, "seconds": 20, "memory_mb": 256}
    squares = {"inputs": ["3", "4"], "outputs": ["9", "16"]}
    assert score("print(int(input()) ** 2)", squares, sandbox=settings)["score"] == 1
    assert score("print(int(input()) * 3)", squares, sandbox=settings)["score"] == 0
    asked = Fusion.seen[-1]
    assert (asked["run_timeout"], asked["memory_limit_MB"]) == (20, 256) and asked["code"] == "print(int(input()) * 3)"
    doubled = {"fn_name": "f", "inputs": [[2], [3]], "outputs": [[4], 6]}
    assert score("print('x')\ndef f(x): return 2 * x", doubled, sandbox=settings)["score"] == 1
    assert score("def f(x): return 3 * x", doubled, sandbox=settings)["score"] == 0
    assert score("raise SystemExit(0)", doubled, sandbox=settings)["score"] == 0


def test_what_a_server_says_of_a_program(server: str) -> None:
    short = FusionSandbox(server, Limits(1, 256, 1), 2)
    assert short.run("while True: pass", "").status == "timeout"
    long = FusionSandbox(server, Limits(30, 256, 1), 2)
    assert (long.run("raise SystemExit(3)", "").status, long.run("print('x' * 2000)", "").status) == ("error", "output")


def test_a_server_that_fails_gives_no_score(server: str) -> None:
    sandbox = FusionSandbox(server, Limits(20, 256, 64), 2)
    Fusion.answers = [(503, {}), (200, {"status": "SandboxError", "message": "no worker"})]
    with pytest.raises(SandboxError, match="could not run a program: no worker"):
        sandbox.run("print(1)", "")
    assert len(Fusion.seen) == 2  # the first was tried again
    for status, reply, said in (
        (400, {"detail": "bad"}, "400"),
        (200, [1], "not an object"),
        (200, {"status": "Success"}, "could not run a program"),
        (
            200,
            {"status": "Failed", "run_result": {"status": "Error", "stderr": "lost"}},
            "could not run a program: lost",
        ),
    ):
        Fusion.answers = [(status, reply)]
        with pytest.raises(SandboxError, match=said):
            sandbox.run("print(1)", "")
    with pytest.raises(SandboxError, match=r"reward\.sandbox\.backend=local"):
        sandbox.check("def f(): pass", "assert f() is None")


def test_a_server_that_runs_nothing_is_found_at_the_start(server: str) -> None:
    Fusion.answers = [
        (200, {"status": "Success", "run_result": {"status": "Finished", "stdout": "41", "return_code": 0}})
    ]
    with pytest.raises(UserError, match="a program that prints 42 gave ok: '41'"):
        open_sandbox({"backend": "fusion", "url": server, "seconds": 21})
