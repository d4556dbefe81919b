"""What processes with models import before they are forked. Importable without torch."""

from __future__ import annotations

PRELOAD = ("hybridflow.placing.train_worker",)
