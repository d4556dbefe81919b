"""The checks of `hybridflow check` before a reward model is trained.

Shapes: T tokens of all conversations.
"""

from __future__ import annotations

from collections.abc import Iterator

from hybridflow.config.kinds.reward_model import RewardModelConfig
from hybridflow.config.locate import is_function_reference
from hybridflow.models.classifier import holds_classifier
from hybridflow.models.source import model_folder
from hybridflow.placing.places import describe_placement
from hybridflow.runs.session import total_steps
from hybridflow.trainers.reward_model import load_pairs


def check_preferences(config: RewardModelConfig) -> Iterator[str]:
    """Checks a run that trains a reward model: its model, its pairs and its sizes."""
    tokenizer, data, held_out = load_pairs(config)
    yield _describe_start(config)
    yield from describe_placement(config)
    for name, found in [("training", data), ("held-out", held_out)]:
        if found is None:
            continue
        longest = found.longest()
        found.batch([max(range(len(longest)), key=longest.__getitem__)])  # refused if it is over the limit
        yield f"{name} pairs {found.source}: {len(found)}, longest conversation {max(longest)} tokens"
        for note in found.notes():
            yield f"  {note}"
    batch = data.batch([0])
    for what, ids, mask in zip(("chosen", "rejected"), batch.rows("input_ids_T"), batch.rows("loss_mask_T")):
        read = int(mask.nonzero()[0, 0]) - 1
        text = tokenizer.decode(ids[:-1]).replace("\n", "\\n")
        yield f"  first {what}: {text[-300:]}  (read at {tokenizer.decode([int(ids[read])])!r}, token {read + 1})"
    data.sampler(seed=config.run.seed).take(1)  # tries data.order
    t = config.train
    steps = total_steps(t.steps, t.epochs, rows=len(data), rows_per_step=t.pairs_per_update)
    passes = f"{steps * t.pairs_per_update / len(data):,.2f}".rstrip("0").rstrip(".")
    yield f"{steps} optimizer steps on {t.pairs_per_update} pairs each: {passes} passes over the data"


def _describe_start(config: RewardModelConfig) -> str:
    m = config.model
    if is_function_reference(m.path):
        return f"model {m.path}: what the function makes"
    if holds_classifier(model_folder(m.path, weights=False)):
        return f"model {m.path}: a reward model, which is trained further"
    return f"model {m.path}: a language model, which gets a head of zeros"
