"""Modules that processes with models import before they are forked. This module imports no torch."""

from __future__ import annotations

PRELOAD = ("hybridflow.placing.train_worker",)
