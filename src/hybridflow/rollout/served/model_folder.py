"""Whether a served engine can take a model, read from its folder before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hybridflow.errors import UserError
from hybridflow.rollout.startup import EngineModel


def check_model(model: EngineModel) -> dict[str, Any]:
    """Returns the configuration of the model in a folder, after a check that it can be sharded over as many processes
    as are asked for.

    Raises:
        UserError: there is no model, or its heads cannot be shared out evenly.
    """
    folder, tensor_parallel = model.folder, model.tensor_parallel
    assert folder is not None, "an engine that is started needs a model"
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"no model at {folder}",
            why="a model folder has a config.json beside its weights",
            fix="give a folder in Hugging Face format",
        )
    config: dict[str, Any] = json.loads(path.read_text())
    text = config.get("text_config", config)
    heads = int(text.get("num_attention_heads") or 1)
    shared = int(text.get("num_key_value_heads") or heads)  # vLLM copies key-value heads where there are too few
    if heads % tensor_parallel or (shared % tensor_parallel and tensor_parallel % shared):
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (shared % n == 0 or n % shared == 0)]
        raise UserError(
            f"rollout.tensor_parallel {tensor_parallel} does not divide the model's heads",
            why=f"it has {heads} attention heads and {shared} of keys and values, of which every process takes as many",
            fix=f"set rollout.tensor_parallel to one of {', '.join(map(str, fitting))}",
        )
    return config
