"""The `hybridflow` command. It reads arguments and calls the rooms; it has no logic of its own."""

from __future__ import annotations

import argparse
import errno
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hybridflow import __version__
from hybridflow.config.load import load_config
from hybridflow.config.sections import EvalConfig, RlConfig, Section, SftConfig
from hybridflow.errors import UserError, nearest

KINDS: dict[str, type[RlConfig] | type[SftConfig] | type[EvalConfig]] = {
    "train": RlConfig,
    "sft": SftConfig,
    "eval": EvalConfig,
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0 done, 1 a mistake of the user's, 130 stopped before the end."""
    given = _parser().parse_args(arguments)
    given.again = shlex.join(["hybridflow", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        return int(given.command(given))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        print(f"error: the disk is full: {error}\n  fix: make room and run again: {given.again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hybridflow", description="Reinforcement-learning post-training of large language models."
    )
    parser.add_argument("--version", action="version", version=f"hybridflow {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in [
        ("train", _train, "reinforcement learning: generate, score, update"),
        ("sft", _train, "supervised fine-tuning on conversations"),
        ("eval", _eval, "score a model's greedy answers"),
        ("check", _check, "find what is wrong with a configuration, without training"),
    ]:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("config", help="YAML file, for example recipes/carry/grpo.yaml")
        command.add_argument("overrides", nargs="*", help="dotted.key=value, for example optim.lr=1e-4 run.seed=1")
        command.set_defaults(command=run, name=name)
    generate = commands.add_parser("generate", help="ask a model", description="Ask a model.")
    generate.add_argument("model", help="Hugging Face folder, run folder, or file.py:function")
    generate.add_argument("prompts", nargs="+", help="what to ask; each is one message of the user")
    generate.add_argument("--max-tokens", type=int, help="longest answer (default 256, less in a short context)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    generate.add_argument("--samples", type=int, default=1, help="answers to each prompt (default 1)")
    generate.add_argument("--seed", type=int, default=0, help="seed of the noise (default 0)")
    generate.set_defaults(command=_generate)
    export = commands.add_parser(
        "export", help="write a checkpoint as a plain Hugging Face folder",
        description="Write a run's newest checkpoint (or --step) as a plain Hugging Face folder, adapters merged.",
    )  # fmt: skip
    export.add_argument("run", help="folder of the run")
    export.add_argument("target", help="folder to write")
    export.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    export.set_defaults(command=_export)
    report = commands.add_parser(
        "report", help="write a run's report.html", description="Write the report of a run: one HTML file."
    )
    report.add_argument("run", help="folder of the run")
    report.set_defaults(command=_report)
    return parser


def _load(given: argparse.Namespace, kind: type[Section]) -> Section:
    try:
        return load_config(kind, given.config, given.overrides)
    except UserError:
        for name, other in KINDS.items():
            if other is not kind and _loads(other, given):
                raise UserError(
                    f"{given.config} is for another command", fix=f"hybridflow {name} {given.config}"
                ) from None
        raise


def _loads(kind: type[Section], given: argparse.Namespace) -> bool:
    try:
        load_config(kind, given.config, given.overrides)
    except UserError:
        return False
    return True


def _train(given: argparse.Namespace) -> int:
    config = _load(given, KINDS[given.name])  # first: a mistake in it is told before torch is imported
    assert isinstance(config, RlConfig | SftConfig)
    from hybridflow.trainers.start import start

    return start(config, again=given.again)


def _eval(given: argparse.Namespace) -> int:
    config = _load(given, EvalConfig)
    assert isinstance(config, EvalConfig)
    from hybridflow.trainers.ask import evaluate_model

    for line in evaluate_model(config):
        print(line)
    return 0


def _check(given: argparse.Namespace) -> int:
    config = _load(given, _kind_of(Path(given.config)))
    assert isinstance(config, RlConfig | SftConfig | EvalConfig)
    from hybridflow.trainers.check import check

    for line in check(config):
        print(line)
    print("all checks passed")
    return 0


def _kind_of(path: Path) -> type[Section]:
    """Which kind of run a file configures, by the sections it has."""
    import yaml

    try:
        sections = yaml.safe_load(path.read_text()) if path.is_file() else {}
    except yaml.YAMLError:
        sections = {}  # loading it says what is wrong
    names = set(sections) if isinstance(sections, dict) else set()
    if "reward" not in names and "train" in names:
        return SftConfig
    return RlConfig if "train" in names else EvalConfig


def _generate(given: argparse.Namespace) -> int:
    from hybridflow.trainers.ask import ask

    for line in ask(
        given.model, given.prompts, max_tokens=given.max_tokens, temperature=given.temperature,
        samples=given.samples, seed=given.seed,
    ):  # fmt: skip
        print(line)
    return 0


def _export(given: argparse.Namespace) -> int:
    from hybridflow.trainers.export import export

    print(f"wrote {export(Path(given.run), Path(given.target), step=given.step, dtype=given.dtype)}")
    return 0


def _report(given: argparse.Namespace) -> int:
    from hybridflow.viewer.report import write_report

    folder = Path(given.run)
    if not (folder / "metrics.jsonl").is_file():
        runs = [str(p.parent) for p in folder.parent.glob("*/metrics.jsonl")]
        raise UserError(f"{folder} is not the folder of a run", fix=nearest(str(folder), runs) if runs else "")
    print(f"wrote {write_report(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
