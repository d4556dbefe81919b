"""The metrics of a step in which the model acted: turns, calls, endings, forks, seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hybridflow.protocols.groups import Group, Trajectory


def acting_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Computes the metrics of trajectories in which the model acted, under verl's names where it has them.

    Args:
        groups: of the step.
    """
    acted = [t for g in groups for t in g.trajectories if t.messages or t.finish_reason == "failed"]
    if not acted:
        return {}
    count, ended = len(acted), Counter(t.finish_reason for t in acted)
    forks = Counter(s.fork.replace(" ", "_") for t in acted for s in t.sequences[1:])
    metrics = _spread("num_turns", [float(len(t.turns)) for t in acted])
    metrics |= _spread("tool_call_counts", [_sum(t, "calls/") for t in acted])
    for name in ("generate_sequences", "tool_calls"):
        metrics |= _spread(f"timing_s/agent_loop/{name}", [t.counts.get(f"seconds/{name}", 0.0) for t in acted])
    metrics |= {
        "agent/failed": float(sum(len(g.failed) for g in groups)),
        "agent/sequences": sum(len(t.sequences) for t in acted) / count,
        "agent/observation_tokens": sum(t.counts.get("observation_tokens", 0.0) for t in acted) / count,
        "agent/cut_observations": sum(t.counts.get("cut_observations", 0.0) for t in acted),
        "agent/observed_markers": sum(t.counts.get("observed_markers", 0.0) for t in acted),
    }
    metrics |= {f"agent/endings/{reason}": n / count for reason, n in ended.items()}
    metrics |= {f"agent/calls/{name}": float(n) for name, n in _added(acted, "calls/").items()}
    metrics |= {f"agent/tool_errors/{kind}": n for kind, n in _added(acted, "errors/").items()}
    metrics |= {f"agent/forks/{kind}": float(n) for kind, n in forks.items()}
    return metrics | {f"agent/info/{name}": n / count for name, n in _added(acted, "info/").items()}


def _added(acted: Sequence[Trajectory], prefix: str) -> dict[str, float]:
    """Adds up the counts whose names begin so, by the rest of the name."""
    found: dict[str, float] = {}
    for t in acted:
        for name, value in t.counts.items():
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                found[rest] = found.get(rest, 0.0) + value
    return found


def _sum(t: Trajectory, prefix: str) -> float:
    return sum(value for name, value in t.counts.items() if name.startswith(prefix))


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}/mean": sum(values) / len(values), f"{name}/max": max(values), f"{name}/min": min(values)}
