"""The report of a run: one HTML file that opens from disk and loads nothing from elsewhere."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hybridflow.tracking.console import duration, held_out
from hybridflow.tracking.events import read_events
from hybridflow.tracking.jsonl import read_metrics
from hybridflow.viewer import samples

POINTS_PER_CURVE = 1_000
PHASES = 6
BARS = 200
EVENTS = 200

# Title, the metric, its unit, and the axis: "share" (0 to 1), "zero" (from 0), "fit" (what the values need).
# The first metric of a chart that the run has is drawn.
BIG_CHARTS = (
    ("Loss", ("train/loss",), "", "fit"),
    ("Gradient norm", ("train/grad_norm",), "", "zero"),
)
SMALL_CHARTS = (
    ("Policy loss", ("actor/pg_loss", "actor/loss"), "", "fit"),
    ("Entropy", ("actor/entropy",), "nats per token", "zero"),
    ("Gradient norm", ("actor/grad_norm",), "", "zero"),
    ("Response length", ("response_length/mean",), "tokens", "zero"),
    ("Responses cut at the limit", ("response_length/clip_ratio",), "", "share"),
    ("Turns per trajectory", ("num_turns/mean",), "", "zero"),
    ("Calls of tools per trajectory", ("tool_call_counts/mean",), "", "zero"),
    ("Trajectories that ended by themselves", ("agent/endings/done",), "", "share"),
    ("Groups of equal reward", ("training/equal_reward_groups",), "", "share"),
    ("Clipped tokens", ("actor/pg_clipfrac",), "", "share"),
    ("Probability gap, sampler to trainer", ("training/rollout_probs_diff_mean",), "", "zero"),
    ("KL, sampler to trainer", ("mismatch/k3/total", "rollout_corr/k3_kl"), "nats per token", "zero"),
    ("Log-probability gap, sampler to trainer", ("mismatch/abs_logp_diff/p99",), "99th percentile", "zero"),
    ("Learning rate", ("actor/lr", "train/lr"), "", "zero"),
    ("Throughput", ("perf/throughput",), "tokens/s", "zero"),
    ("GPU memory", ("perf/max_memory_allocated_gb",), "GB, peak", "zero"),
    ("Process memory", ("perf/cpu_memory_used_gb",), "GB, peak", "zero"),
)

TRAINING_REWARD = "critic/score/mean"

Curve = list[tuple[int, float | None]]


def write_report(run_folder: Path) -> Path:
    """Writes ``report.html`` into a run's folder, at any time, also while it runs.

    Returns:
        The file.
    """
    run_folder = Path(run_folder)
    data = gather(run_folder)
    template = resources.files("hybridflow.viewer").joinpath("report.html").read_text(encoding="utf-8")
    # Inside a script element only "<" can end it; escaping it as JSON keeps every text as it is.
    encoded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    # Names of files can hold bytes that are not UTF-8.
    page = template.replace("{{data}}", encoded, 1).replace("{{title}}", html.escape(data["title"]), 1)
    target = run_folder / "report.html"
    aside = run_folder / ".report.html.partial"
    aside.write_text(page, encoding="utf-8", errors="replace")
    os.replace(aside, target)
    return target


def gather(run_folder: Path) -> dict[str, Any]:
    """Gathers everything that the page shows, as plain JSON values."""
    config_file = run_folder / "config.yaml"
    config_text = config_file.read_text(encoding="utf-8", errors="replace") if config_file.exists() else ""
    config = _settings(config_text)
    metrics = read_metrics(run_folder / "metrics.jsonl")
    events = read_events(run_folder / "events.jsonl")
    curves = _curves(metrics)
    last_step = max((int(m["step"]) for m in metrics), default=0)
    total_steps = max(last_step, int(_section(config, "train").get("steps") or 0))
    evaluations = samples.evaluations(run_folder / "evaluations", last_step)
    return {
        "title": run_folder.resolve().name,
        "subtitle": _subtitle(config),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "status": _status(events, last_step, total_steps),
        "tiles": _tiles(metrics, last_step, total_steps, accuracy=evaluations is not None and evaluations["binary"]),
        "charts": _charts(curves),
        "steps": [min((int(m["step"]) for m in metrics), default=0), last_step],
        "phases": _phases(metrics),
        "table": _table(curves),
        "stride": _stride(max(map(len, curves.values()), default=0), POINTS_PER_CURVE),
        "evaluations": evaluations,
        "rollouts": samples.rollouts(run_folder / "rollouts", last_step, _section(config, "algorithm")),
        "config": config_text,
        "events": events[-EVENTS:],
        "events_left_out": max(0, len(events) - EVENTS),
    }


def _settings(text: str) -> Mapping[str, Any]:
    """Returns the content of config.yaml; nothing where it was damaged: the page then shows its text, and the records
    as they are.
    """
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _subtitle(config: Mapping[str, Any]) -> str:
    train, algorithm = _section(config, "train"), _section(config, "algorithm")
    parts = [str(_section(config, "model").get("path", ""))]
    if algorithm:
        parts.append(str(algorithm.get("preset", "")))
        parts.append(f"{train.get('prompts_per_step')} prompts x {train.get('samples_per_prompt')} responses per step")
    elif train:
        parts.append(f"supervised, {train.get('sequences_per_update')} conversations per step")
    return " \u00b7 ".join(filter(None, parts))


def _status(events: Sequence[Mapping[str, str]], last_step: int, total_steps: int) -> dict[str, str]:
    """Describes how the run ended, from the last event that reports an end; else how far it is."""
    progress = f"step {last_step} of {total_steps}"
    for event in reversed(events):
        if event["kind"] == "done":
            return {"word": "done", "text": event["text"]}
        if event["kind"] in ("stopped", "failed"):
            return {"word": event["kind"], "text": event["text"]}
        if event["kind"] == "resume":
            break
    if last_step >= total_steps > 0:
        return {"word": "done", "text": progress}
    return {"word": "unfinished", "text": f"{progress} when this page was written"}


def _curves(metrics: Sequence[Mapping[str, float]]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for values in metrics:
        for name, value in values.items():
            if name not in ("step", "training/global_step"):
                short = float(f"{value:.6g}")  # the largest floats round up to infinity
                number = short if math.isfinite(short) else None
                curves.setdefault(name, []).append((int(values["step"]), number))
    return curves


def _tiles(
    metrics: Sequence[Mapping[str, float]], last_step: int, total_steps: int, *, accuracy: bool
) -> list[dict[str, str]]:
    """Returns the numbers at the top of the page; the mean of held-out rewards of only 0 and 1 is an accuracy."""
    tiles = []
    evaluated = [(int(m["step"]), sum(found.values()) / len(found)) for m in metrics if (found := held_out(m))]
    if evaluated:
        (first_step, first), (end_step, end) = evaluated[0], evaluated[-1]
        note = f"{first:.3f} at step {first_step}" if end_step > first_step else f"at step {end_step}"
        sources = max(len(held_out(m)) for m in metrics)
        if sources > 1:
            note += f"; mean of {sources} sources"
        tiles.append(
            {"label": "Held-out accuracy" if accuracy else "Held-out mean reward", "value": f"{end:.3f}", "note": note}
        )
    for label, name, form in [
        ("Training reward", "critic/score/mean", "{:.3f}"),
        ("Loss", "train/loss", "{:.4f}"),
        ("Held-out accuracy of pairs", "val/accuracy", "{:.3f}"),
        ("Response length", "response_length/mean", "{:.1f}"),
    ]:
        values = [m[name] for m in metrics if name in m]
        if values:
            note = f"{form.format(values[0])} at first"
            tiles.append({"label": label, "value": form.format(values[-1]), "note": note})
    tiles.append({"label": "Steps", "value": f"{last_step:,}", "note": f"of {total_steps:,}"})
    seconds = [m["timing_s/step"] for m in metrics if math.isfinite(m.get("timing_s/step", math.nan))]
    if seconds:
        note = f"{sum(seconds) / len(seconds):.3g} s per step"
        tiles.append({"label": "Time", "value": duration(sum(seconds)), "note": note})
    rates = [m["perf/throughput"] for m in metrics if math.isfinite(m.get("perf/throughput", math.nan))]
    if rates:
        tiles.append({"label": "Throughput", "value": f"{sum(rates) / len(rates):,.0f}", "note": "tokens/s, mean"})
    return tiles


def _charts(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """Returns the charts that the run has numbers for, large ones first. Training and held-out reward share one."""
    charts = []
    reward = {TRAINING_REWARD: "in training"} if TRAINING_REWARD in curves else {}
    reward |= {name: f"held out, {source}" for name in sorted(curves) for source in held_out({name: 0.0})}
    if reward:
        lines = [{"label": label, "name": n, "points": _thin(curves[n])} for n, label in reward.items()]
        charts.append({"title": "Reward", "big": True, "axis": "share", "unit": "", "lines": lines})
    for big, table in ((True, BIG_CHARTS), (False, SMALL_CHARTS)):
        for title, names, unit, axis in table:
            name = next((n for n in names if n in curves), None)
            if name is not None:
                lines = [{"label": title, "name": name, "points": _thin(curves[name])}]
                charts.append({"title": title, "big": big, "axis": axis, "unit": unit, "lines": lines})
    return charts


def _thin(curve: Curve) -> Curve:
    """Returns at most `POINTS_PER_CURVE` points, evenly taken, the last one always."""
    stride = _stride(len(curve), POINTS_PER_CURVE)
    return curve if stride == 1 else [*curve[:-1:stride], curve[-1]]


def _stride(size: int, most: int) -> int:
    return max(1, math.ceil(size / most))


def _phases(metrics: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """Sums the seconds of each step by phase; small phases and the time outside of phases are "other"."""
    steps = [m for m in metrics if math.isfinite(m.get("timing_s/step", math.nan))]
    if not steps:
        return None
    totals: dict[str, float] = {}
    for values in steps:
        for name, value in values.items():
            # Names with a further part, such as timing_s/agent_loop/..., are of trajectories and not of the step.
            phase = name.startswith("timing_s/") and name.count("/") == 1 and name != "timing_s/step"
            if phase and math.isfinite(value):
                totals[name] = totals.get(name, 0.0) + value
    whole = sum(m["timing_s/step"] for m in steps) or 1.0
    named = [n for n in sorted(totals, key=lambda n: -totals[n])[:PHASES] if totals[n] > 0.01 * whole]
    shares = {n.removeprefix("timing_s/"): totals[n] / whole for n in named}
    shares["other"] = max(0.0, 1 - sum(shares.values()))
    rows, bar = [], _stride(len(steps), BARS)
    for i in range(0, len(steps), bar):  # a bar is the mean of its steps: a sample would miss what is not in every step
        group = steps[i : i + bar]
        parts = [sum(m[n] for m in group if math.isfinite(m.get(n, math.nan))) / len(group) for n in named]
        rest = max(0.0, sum(m["timing_s/step"] for m in group) / len(group) - sum(parts))
        ends = [int(group[0]["step"]), int(group[-1]["step"])]
        rows.append([*ends, [float(f"{seconds:.4g}") for seconds in (*parts, rest)]])
    return {"names": list(shares), "shares": list(shares.values()), "total": duration(whole), "rows": rows}


def _table(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    rows = []
    for name in sorted(curves):
        values = [v for _, v in curves[name] if v is not None]
        if values:
            row = {"name": name, "first": values[0], "last": values[-1], "min": min(values), "max": max(values)}
            rows.append(row | {"count": len(curves[name])})
    return rows
