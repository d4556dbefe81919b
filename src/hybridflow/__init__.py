"""hybridflow: reinforcement-learning post-training of large language models.

``import hybridflow as hf`` gives the public names, each loaded when it is first used; docs/python.md describes them.
`docs/architecture.md` says what else lives where.
"""

from __future__ import annotations

import importlib
from typing import Any

from hybridflow.errors import UserError, nearest

__version__ = "0.1.0"

# Where the public names live; `__init__.pyi` says the same to type checkers. A table and a stub, and not imports,
# because importing the package must not import torch.
_HOMES = {
    "train": "hybridflow.face.train",
    "load_config": "hybridflow.config.load",
    "open_run": "hybridflow.trainers.rl.run",
    "next_groups": "hybridflow.trainers.rl.loop",
    "estimate": "hybridflow.trainers.rl.loop",
    "update": "hybridflow.trainers.rl.loop",
    "publish_weights": "hybridflow.trainers.rl.loop",
    "record": "hybridflow.trainers.rl.loop",
    "Batch": "hybridflow.batch",
    "Group": "hybridflow.protocols.groups",
    "Loss": "hybridflow.protocols.training",
    "Request": "hybridflow.protocols.generation",
    "Sampling": "hybridflow.protocols.generation",
    "Action": "hybridflow.protocols.environments",
    "Environment": "hybridflow.protocols.environments",
    "Observation": "hybridflow.protocols.environments",
    "ToolResult": "hybridflow.protocols.environments",
    "tool": "hybridflow.protocols.environments",
    "RlConfig": "hybridflow.config.kinds.rl",
}
__all__ = ["UserError", "__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        hint = "" if name.startswith("__") else f"; {nearest(name, __all__)}"
        raise AttributeError(f"module 'hybridflow' has no attribute {name!r}{hint}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
