"""Liger's fused kernels for norms, rotary embeddings and gated layers, where Triton runs them.

Liger Kernel: Efficient Triton Kernels for LLM Training, arXiv 2410.10989. Its losses are left out: `log_probs` computes
what all losses here need without holding the logits.
"""

from __future__ import annotations

import importlib.util

import torch
from transformers.modeling_utils import PreTrainedModel

from hybridflow.errors import UserError


def require_liger() -> None:
    """Checks that the kernels' packages and a GPU to run them are there, without loading anything.

    Raises:
        UserError: one of them is not there.
    """
    missing = [name for name in ("triton", "liger_kernel") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"model.liger needs {' and '.join(missing)}, not installed here",
            why="Liger's kernels are written in Triton",
            fix="pip install 'hybridflow[liger]' on a machine with a GPU, or leave out model.liger",
        )
    if not torch.cuda.is_available():
        raise UserError(
            "model.liger needs a GPU, and torch finds none",
            why="Liger's kernels are written in Triton, which does not run them on a CPU",
            fix="leave out model.liger",
        )


def apply_liger(model: PreTrainedModel) -> None:
    """Replaces the model's layers where Liger has kernels for them; models of its family that are loaded later too.

    Raises:
        UserError: see `require_liger`; or Liger has none for this family.
    """
    require_liger()
    from liger_kernel.transformers import monkey_patch

    known = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if model.config.model_type not in known:
        raise UserError(
            f"Liger has no kernels for {type(model).__name__} ({model.config.model_type})",
            fix=f"leave out model.liger, or take one of its families: {', '.join(sorted(known))}",
        )
    monkey_patch._apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
