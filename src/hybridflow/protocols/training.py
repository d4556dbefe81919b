"""The protocols of engines that score and train, and their records."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hybridflow.batch import Batch
from hybridflow.protocols.weights import WeightStream


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss by name and parameters: it travels to worker processes, where the function is looked up.

    Args:
        name: a key of `algorithms.losses.LOSSES`, or the user's own ``file.py:function`` that returns a `LossSpec`.
        params: parameters of the loss; "temperature" divides the logits before.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Update:
    """The result of one optimizer step.

    Args:
        metrics: loss, gradient norm, learning rate, ... (sums already divided).
        applied: False when the loss or the gradient was not finite: weights and optimizer are then untouched.
        bad_rows: indices of the sequences whose own loss was not finite.
    """

    metrics: dict[str, float]
    applied: bool = True
    bad_rows: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pending:
    """Scores that may still be computed elsewhere: a call returns them.

    Args:
        result: waits for them and returns them.
        done: returns whether `result` would return at once.
    """

    result: Callable[[], dict[str, Tensor]]
    done: Callable[[], bool] = lambda: True

    def __call__(self) -> dict[str, Tensor]:
        """Returns the scores."""
        return self.result()


class Scorer(Protocol):
    """Scores tokens; owns its micro-batches, so the result never depends on how a batch is cut."""

    def score(self, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, Tensor]:
        """Computes per-token columns under the current weights, without gradients.

        Args:
            batch: needs ``input_ids_T`` and ``loss_mask_T``; only masked-in tokens are scored, others are 0.
            outputs: of "logp" (``logp_T``), "entropy" (``entropy_T``), "sum_pi_squared" (``sum_pi_squared_T``, the sum
                over the words of their squared probabilities), "log_mass" (``log_mass_T``, the log-probability of
                all words that a token was drawn from), and of a critic "value" (``value_T``).
            temperature: divides the logits first.
        """
        ...

    def score_later(self, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> Pending:
        """Begins to score; the result returns the scores when it is called. In this process they are there already."""
        scores = self.score(batch, outputs, temperature=temperature)
        return Pending(lambda: scores)

    def rest(self) -> None:
        """Moves what ``engine.offload`` names to host memory, because another model works on its devices now; here,
        nothing.
        """
        return


class TrainEngine(Scorer, Protocol):
    """Trains; owns its micro-batches too. Classes of training engines derive from this class, those of scorers from
    `Scorer`.
    """

    def update(self, batch: Batch, loss: Loss) -> Update:
        """Takes one optimizer step on the sum over tokens of weight x loss: see `algorithms.aggregation`. None if
        empty.
        """
        ...

    def update_later(self, batch: Batch, loss: Loss) -> Callable[[], Update]:
        """Begins an optimizer step; the result returns its `Update` when it is called. In this process it is over by
        then.
        """
        update = self.update(batch, loss)
        return lambda: update

    def without_adapters(self) -> Scorer:
        """Returns the model as it was before its adapters were trained: it scores with them switched off."""
        ...

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Returns the token ids that end a response of this model: see `models.load.stop_ids`."""
        ...

    def save(self, folder: Path, *, background: bool = False) -> None:
        """Writes weights and all other state that a run needs to continue bit for bit.

        Args:
            folder: an existing, empty folder; of a sharded engine, the same on every process, which all call this.
            background: copy the state, and write it while the engine continues; see `saved`.
        """
        ...

    def saved(self, *, wait: bool) -> bool:
        """Returns whether the last `save` has written all of its files; with `wait`, waits for it. The next `save`
        needs that.

        Raises:
            OSError: or any other error that kept it from writing.
        """
        ...

    def load(self, folder: Path) -> None:
        """Continues from what any engine of the same model saved.

        Raises:
            UserError: it is of another model.
        """
        ...

    def export(self, folder: Path, dtype: torch.dtype = ...) -> None:
        """Writes the model alone as a plain Hugging Face folder without a tokenizer; adapters are merged.

        Args:
            folder: an existing, empty folder.
            dtype: precision of the written weights; float32 where none is given.
        """
        ...

    def stream_weights(self, *, lora: Literal["adapters", "merged"] | None = None) -> WeightStream:
        """Returns the current weights, under Hugging Face names; of a sharded engine, all processes consume it
        together.

        Args:
            lora: "adapters" alone; "merged" into plain weights; None: both beside each other.
        """
        ...

    def perturb(self, names: Collection[str] | None = None) -> None:
        """Changes every element of every tensor that is published, in place; a second call puts all back bit for bit.

        See `weights.drill`. Nothing is trained or saved in between.

        Args:
            names: of tensors, as they are published (tied ones by their first name), that alone are changed.
        """
        ...

    def to(self, where: Literal["device", "host"]) -> None:
        """Moves weights and optimizer state to the accelerator or to host memory."""
        ...
