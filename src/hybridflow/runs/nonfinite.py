"""Counts updates that were not applied because the loss was not finite: a few are recorded, several in a row end the
run.
"""

from __future__ import annotations

import math

from hybridflow.errors import UserError
from hybridflow.protocols.training import Update
from hybridflow.tracking.events import EventLog

LIMIT = 3  # updates in a row


class NonfiniteUpdates:
    """Counts them, for the actor and the critic apart.

    Args:
        events: where each is noted.
    """

    def __init__(self, events: EventLog) -> None:
        self.events = events
        self.in_a_row: dict[str, int] = {}  # of the actor, of the critic

    def note(self, update: Update, data_rows: list[int], step: int) -> None:
        """Counts an update.

        Args:
            update: what it did.
            data_rows: for every sequence of the mini-batch, its row in the data.
            step: the current step.

        Raises:
            UserError: three in a row were not applied; the rows are named.
        """
        part = "critic" if "critic/loss" in update.metrics else "actor"
        if update.applied:
            self.in_a_row[part] = 0
            return
        self.in_a_row[part] = self.in_a_row.get(part, 0) + 1
        rows = sorted({data_rows[i] for i in update.bad_rows})
        self.events.append(
            "nonfinite", f"step {step}: loss not finite, update not applied; data rows {rows or 'unknown'}"
        )
        if self.in_a_row[part] == LIMIT:
            loss, norm = (update.metrics.get(f"{part}/{name}", math.nan) for name in ("loss", "grad_norm"))
            whose, key = ("the critic: ", "critic.optim.lr") if part == "critic" else ("", "optim.lr")
            raise UserError(
                f"the loss was not finite {LIMIT} updates in a row; last in data rows {rows or 'unknown'}",
                why=f"{whose}loss {loss}, gradient norm {norm}; no such update was applied",
                fix=f"lower {key}, look at these rows, and start from the last checkpoint",
            )
