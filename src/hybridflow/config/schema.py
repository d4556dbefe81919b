"""The JSON schema of a configuration, with which an editor completes and checks keys: `hybridflow schema train`."""

from __future__ import annotations

import json

from hybridflow.config.describe import COMMANDS


def schema(command: str) -> str:
    """The schema (JSON Schema 2020-12) of a configuration, as text.

    Args:
        command: "train", "sft", "reward-model" or "eval".

    What fits it may still be refused: rules between keys are checked when a configuration is loaded.
    """
    values = COMMANDS[command].model_json_schema()
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"hybridflow {command}"}
    return json.dumps(head | {k: v for k, v in values.items() if k != "title"}, indent=1) + "\n"
