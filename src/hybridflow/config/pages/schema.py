"""The JSON schema of a configuration, with which an editor completes and checks keys: `hybridflow schema train`."""

from __future__ import annotations

import json

from hybridflow.config.kinds.registry import KINDS


def schema(command: str) -> str:
    """Returns the schema (JSON Schema 2020-12) of a configuration, as text.

    Args:
        command: one of `KINDS`.

    A configuration that fits it may still be refused: rules between keys are checked when it is loaded.
    """
    values = KINDS[command].config.model_json_schema()
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"hybridflow {command}"}
    return json.dumps(head | {k: v for k, v in values.items() if k != "title"}, indent=1) + "\n"
