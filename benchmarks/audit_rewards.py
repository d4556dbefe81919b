"""Audits every built-in reward with its own cases (docs/audit.md), and prints the table of that page.

python benchmarks/audit_rewards.py benchmarks/results/audit_rewards.json
python benchmarks/audit_rewards.py /tmp/audit.json gsm8k math
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from hybridflow.commands.audit_reward import AuditOptions, audit_reward
from hybridflow.rewards.verifiable.registry import REWARDS

from measuring import record

KINDS = ("false accept", "failure", "unstable", "leak", "range")


def main(out: str, names: list[str]) -> None:
    """Audits these rewards, or all, and writes the reports."""
    reports = {}
    for name in names or REWARDS:
        report = audit_reward(name, None, AuditOptions())
        print("\n".join(report.lines()), file=sys.stderr, flush=True)
        reports[name] = report.values()
    command = shlex.join(["python", *sys.argv])
    Path(out).write_text(json.dumps(record(command, "the built-in cases, whole", reports), indent=1) + "\n")
    print("\n".join(table(reports)))


def table(reports: dict[str, Any]) -> list[str]:
    """Renders the reports as a table of Markdown."""
    lines = [
        "| reward | responses | faults | correct responses rejected | by design | calls / CPU s | slowest call |",
        "| --- | ---: | ---: | --- | --- | ---: | --- |",
    ]
    for name, report in reports.items():
        rejected = [f["text"] for f in report["findings"] if f["kind"] == "false reject"]
        faults = sum(f["kind"] in KINDS for f in report["findings"])
        measured, reasons = report["measured"], sorted(set(report["by_design"].values()))
        lines.append(
            f"| `{name}` | {report['answers']} | {faults} | {', '.join(rejected) or '-'} | {'; '.join(reasons) or '-'} "
            f"| {measured['calls per CPU second']:,.0f} | {measured['slowest call']} |"
        )
    return lines


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
