"""Builds the wheel, installs it outside of the repository, and uses it there, as a user who has no clone does.

python scripts/check_wheel.py [LIGHT]

The dependencies are those of the interpreter that runs this. LIGHT is a virtual environment with another Python and
without torch, transformers, numpy and pyarrow: commands that need none of them work there, others say what to install.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "numpy", "pyarrow", "safetensors")
INIT = ("init", "--model", "a", "--data", "b.jsonl", "--reward", "gsm8k", "--out", "my.yaml")
NEED_TORCH = [
    ["train", "recipes/carry/grpo.yaml"], ["sft", "recipes/carry/sft.yaml"], ["check", "recipes/carry/grpo.yaml"],
    ["eval", "recipes/carry/eval.yaml"], ["doctor"], ["generate", "model", "prompt"], ["export", "run", "target"],
    ["audit-reward", "gsm8k"], ["prepare", "gsm8k", "--out", "data"],
]  # fmt: skip
METADATA = "import importlib.metadata as m, json; print(json.dumps(m.metadata('hybridflow').json))"
HELP = """
import sys
from hybridflow.cli.main import main
for command in [[], *([name] for name in sys.argv[1:])]:
    try:
        main([*command, "--help"])
    except SystemExit as ended:
        assert ended.code == 0, command
"""
COMPLETE = """
eval "$({} completion bash)"
for typed in "hybridflow" "hybridflow recipes" "hybridflow train"; do
  COMP_WORDS=($typed ''); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
  _hybridflow
  echo "${{COMPREPLY[@]}}"
done
"""
CHECK_AND_TRAIN = """
import sys
from hybridflow.cli.main import main
sys.exit(main(["check", *sys.argv[1:]]) or main(["train", *sys.argv[1:]]))
"""


class Installed:
    """A virtual environment with the wheel and another environment's packages, and an empty folder to work in."""

    def __init__(self, wheel: Path, base: Path, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir(parents=True)
        run([base, "-m", "venv", "--without-pip", folder / "venv"])
        self.python = folder / "venv/bin/python"
        theirs, ours = (
            Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
            for python in (base, self.python)
        )
        run([base, "-m", "pip", "--python", self.python, "install", "-q", "--no-deps", "--no-index", wheel])
        # Searched after the wheel's folder; .pth files in it, as of an editable installation, have no effect.
        (ours / "dependencies.pth").write_text(f"{theirs}\n")
        found = Path(self.code("import hybridflow; print(hybridflow.__file__)").strip())
        assert found == ours / "hybridflow/__init__.py", found

    def code(self, code: str, *arguments: str) -> str:
        return run([self.python, "-c", code, *arguments], self.folder)

    def command(self, *words: str, status: int = 0) -> str:
        """Gives the command that the wheel installs."""
        return run([self.python.parent / "hybridflow", *words], self.folder, status)


def run(command: list[str | Path], folder: Path | None = None, status: int = 0) -> str:
    """Returns what a command prints; one that ends with another status fails the check."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, text=True, stdout=-1, stderr=-2, check=False
    )
    assert done.returncode == status, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def build(folder: Path) -> Path:
    """Builds in a copy of the sources: in the tree itself, what an earlier build left would be packed too."""
    sources = folder / "sources"
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, sources / name)
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, sources])
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_files(wheel: Path) -> None:
    """Finds every file of the package and of the recipes in the wheel as it is, and nothing else."""
    package = [file for file in (ROOT / "src/hybridflow").rglob("*") if "__pycache__" not in file.parts]
    wanted = {file.relative_to(ROOT / "src").as_posix(): file for file in package if file.is_file()}
    for file in (ROOT / "recipes").glob("*/*"):
        if file.is_file():
            wanted[f"hybridflow/{file.relative_to(ROOT).as_posix()}"] = file
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert held.keys() == wanted.keys(), held.keys() ^ wanted.keys()
    assert [name for name, file in wanted.items() if held[name] != file.read_bytes()] == []


def check_metadata(installed: Installed, version: str) -> None:
    said = json.loads(installed.code(METADATA))
    assert said["version"] == version
    assert said["requires_python"] == ">=3.11" and said["license_expression"] == "Apache-2.0"
    assert said["description"].strip() == (ROOT / "README.md").read_text().strip()
    assert any(url.startswith("Paper, https://") for url in said["project_url"])
    assert "Programming Language :: Python :: 3.13" in said["classifier"] and "GRPO" in str(said["keywords"])


def check_recipes(installed: Installed) -> None:
    """Lists and copies the recipes, never over a file."""
    names = [recipe["name"] for recipe in json.loads(installed.command("recipes", "--json"))]
    assert names == sorted(readme.parent.name for readme in (ROOT / "recipes").glob("*/README.md"))
    listed = installed.command("recipes")
    for name in names:
        assert f"hybridflow recipes {name}\n" in listed
        said = installed.command("recipes", name)
        assert f"hybridflow sft recipes/{name}/sft.yaml" in said
        copied = {file.name: file.read_bytes() for file in (installed.folder / "recipes" / name).iterdir()}
        assert copied == {file.name: file.read_bytes() for file in (ROOT / "recipes" / name).glob("*.*")}
    (installed.folder / "recipes/carry/grpo.yaml").write_text("mine")
    said = installed.command("recipes", "carry", status=1)
    assert "recipes/carry exists already" in said and "hybridflow recipes carry my-carry" in said
    assert (installed.folder / "recipes/carry/grpo.yaml").read_text() == "mine"
    assert "hybridflow train my/carry/grpo.yaml" in installed.command("recipes", "carry", "my/carry")
    (installed.folder / "my/carry/grpo.yaml").replace(installed.folder / "recipes/carry/grpo.yaml")


def check_light_commands(installed: Installed) -> None:
    """Gives the commands that need no torch: every help, schemas, a new configuration, a key explained, completion."""
    commands = re.findall(r"^    ([a-z-]+)(?:  |$)", installed.command("--help"), re.M)
    assert {"train", "audit-reward", "recipes"} <= set(commands)
    helps = installed.code(HELP, *commands)
    named = set(re.findall(r"recipes/\w+/[\w.-]*\w", helps))
    assert "recipes/rlhf/reward-model.yaml" in named
    assert [path for path in named if not (installed.folder / path).is_file()] == []
    assert installed.command("schema", "train") == (ROOT / "docs/schema/train.json").read_text()
    assert "number > 0" in installed.command("check", "--explain", "optim.lr")
    assert "hybridflow check my.yaml" in installed.command(*INIT)
    assert "hybridflow recipes carry" in installed.command("train", "recipes/none.yaml", status=1)
    hybridflow = installed.python.parent / "hybridflow"
    said = run(["bash", "-c", COMPLETE.format(hybridflow)], installed.folder).splitlines()
    assert [word in line.split() for word, line in zip(("recipes", "carry", "optim.lr="), said)] == [True] * 3, said


def check_training(installed: Installed) -> None:
    """Checks and trains the copied recipe with the model of its task, and looks at what the run leaves."""
    config, model = "recipes/carry/grpo.yaml", "model.path=recipes/carry/task.py:tiny_qwen3"
    tiny = ["train.prompts_per_step=2", "train.samples_per_prompt=2", "rollout.max_response_tokens=8", "data.eval=null"]
    said = installed.code(CHECK_AND_TRAIN, config, model, "train.steps=1", "eval=null", *tiny)
    assert "all checks passed" in said
    left = {path.name for path in (installed.folder / "runs/carry-grpo").iterdir()}
    assert {"metrics.jsonl", "model", "report.html"} <= left


def check_without_torch(installed: Installed) -> None:
    """Gives commands that need torch: each says what to install."""
    for package in HEAVY:
        with contextlib.suppress(AssertionError):
            installed.code(f"import {package}")
            raise SystemExit(f"{package} is in the environment that should be light")
    for words in NEED_TORCH:
        said = installed.command(*words, status=1)
        assert "is not installed" in said and "pip install 'torch" in said and "Traceback" not in said, said


def main() -> None:
    version = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[0]
    light = Path(sys.argv[1]).absolute() / "bin/python" if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        check_files(wheel)
        pythons = [Path(sys.executable), *([light] if light is not None and light.is_file() else [])]
        for base in pythons:
            installed = Installed(wheel, base, Path(folder) / f"with-{base.parents[1].name}")
            assert installed.command("--version") == f"hybridflow {version}\n"
            assert (
                run([installed.python, "-m", "hybridflow", "--version"], installed.folder) == f"hybridflow {version}\n"
            )
            check_metadata(installed, version)
            check_recipes(installed)
            check_light_commands(installed)
            (check_without_torch if base == light else check_training)(installed)
            print(f"the wheel works with Python {run([base, '-V']).split()[1]}" + " without torch" * (base == light))
        if len(pythons) == 1:
            print("skipped: the wheel with another Python and without torch (there is no environment for it)")


if __name__ == "__main__":
    main()
