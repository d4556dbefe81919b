#!/usr/bin/env bash
# Makes a virtual environment in which SGLang runs on a CPU, and this project is installed: about 4 minutes and 3 GB.
#
#   scripts/install-sglang-cpu.sh [VENV]      default .venv-sglang; run again it repairs or brings up to date
#
#   PYTHON           the interpreter that makes the environment (default python3), 3.11 or newer
#   TORCH            the torch to install (default torch==2.13.0, the one that was tested)
#   TORCH_INDEX_URL  where to take torch from, when the default would be a GPU build
#
# Why not `pip install sglang`: that brings torch 2.14.1, which this project does not support, and CUDA kernels, which a
# CPU cannot load. SGLang itself is plain Python: on a CPU without AMX it computes with torch alone, once its imports of
# two missing packages are satisfied (scripts/sglang_cpu_stand_ins.py). A CPU with AMX needs SGLang's own build of
# sgl_kernel for CPUs.
#
# `pip check` names what is left out on purpose, and is right: the GPU kernels, torchvision, torchaudio, torchcodec, and
# another torch.
set -euo pipefail

SGLANG=sglang==0.5.23

venv=${1:-.venv-sglang}
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

step() { # step "what is done" command ...
  local what=$1
  shift
  echo "install-sglang-cpu: $what"
  "$@" || { echo "install-sglang-cpu: FAILED: $what. The command was: $*" >&2; exit 1; }
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "install-sglang-cpu: needs Python >= 3.11; '$python' is not. Say which to use: PYTHON=python3.12 $0" >&2; exit 1; }
[[ -x $venv/bin/python ]] || step "virtual environment $venv" "$python" -m venv "$venv"

pip=("$venv/bin/python" -m pip install --quiet)
index=(${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"})
# torch first and alone: resolved together with the rest, a looser requirement can pull another build.
step "$torch" "${pip[@]}" ${index[@]+"${index[@]}"} "$torch"
step "what SGLang needs" "${pip[@]}" -r "$project/scripts/requirements-sglang-cpu.txt"
step "$SGLANG" "${pip[@]}" --no-deps "$SGLANG"
# The same call names SGLang's dependencies again, so that nothing of the project's moves them.
step "this project, and what its tests need" "${pip[@]}" -r "$project/scripts/requirements-sglang-cpu.txt" \
  -e "$project[lora]" "pytest>=8" "pytest-timeout>=2.3" "pytest-xdist>=3.6" "hypothesis>=6.100"

packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
step "stand-ins for what a CPU does not need" cp "$project/scripts/sglang_cpu_stand_ins.py" "$packages"
echo "import sglang_cpu_stand_ins" > "$packages/sglang_cpu_stand_ins.pth"

imports='
import torch, transformers
from sglang.srt.entrypoints.engine import Engine
from sglang.version import __version__
import hybridflow
print(f"install-sglang-cpu: ready: SGLang {__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
'
step "import of SGLang" env SGLANG_USE_CPU_ENGINE=1 HF_HUB_OFFLINE=1 "$venv/bin/python" -W ignore -c "$imports"
