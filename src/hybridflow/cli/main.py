"""The `hybridflow` command. It reads arguments and calls the rooms; it has no logic of its own."""

from __future__ import annotations

import argparse
import errno
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridflow import __version__
from hybridflow.cli.completion import SHELLS, completion
from hybridflow.cli.needs import missing_requirements
from hybridflow.cli.parser import Parser, Program, never_fails_to_print, path, reader_is_gone
from hybridflow.commands.recipes import copy_recipe, recipe_lines, recipe_names, recipes
from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.registry import KINDS, Kind
from hybridflow.config.load import load_config
from hybridflow.config.paths import home
from hybridflow.config.sections.placement import resolved_placement
from hybridflow.controller.backends.forking import start_server
from hybridflow.errors import UserError, nearest, typed
from hybridflow.placing.preload import PRELOAD

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Parser]
    Handler = Callable[[argparse.Namespace], int]
OVERRIDES = "dotted.key=value, for example optim.lr=1e-4 run.seed=1"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0 done, 1 a mistake of the user's, 130 stopped before the end."""
    never_fails_to_print()
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words:
        _parser().print_help(sys.stderr)
        raise SystemExit(2)
    given = _parser().parse_args(words)
    given.again = typed(*words)
    try:
        status = int(given.command(given))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return reader_is_gone()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        missing = missing_requirements()
        if not missing:
            raise
        text = UserError(
            f"{error.name} is not installed", why=f"hybridflow {given.name} needs packages that are missing here",
            fix=f"pip install {shlex.join(missing)}",
        )  # fmt: skip
        print(f"error: {text}", file=sys.stderr)
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
    parser = Program(
        prog="hybridflow", description="Reinforcement-learning post-training of large language models.",
        epilog="to begin with:\n  hybridflow recipes          lists the recipes that the examples name\n"
        "  hybridflow recipes carry    copies one into the current folder, and prints its commands",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hybridflow {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    _add_kinds(commands)
    _add_commands_on_configurations(commands)
    _add_commands_on_models(commands)
    _add_prepare(commands)
    return parser


def _add(
    commands: Commands, name: str, run: Handler, text: str, example: str, more: str = ""
) -> argparse.ArgumentParser:
    """Adds a command with its help: what it does, more about it, and an example that can be typed."""
    said = f"{text[0].upper()}{text[1:]}.\n{more}".strip() + "\n"
    command = commands.add_parser(
        name, help=text, description=said, epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.set_defaults(command=run, name=name)
    return command


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON, for a script")


def _add_kinds(commands: Commands) -> None:
    for kind in [kind for kind in KINDS.values() if kind.train is not None]:
        command = _add(commands, kind.name, _train, kind.does, f"hybridflow {kind.name} {kind.example}")
        command.add_argument("config", type=path, help="YAML file, for example recipes/carry/grpo.yaml")
        command.add_argument("overrides", nargs="*", default=[], help=OVERRIDES)
    evaluate = _add(
        commands, "eval", _eval, KINDS["eval"].does,
        f"hybridflow eval {KINDS['eval'].example}\n  hybridflow eval runs/eval-of-a runs/eval-of-b\n"
        "  hybridflow eval runs/a runs/b run.folder=runs/a-or-b --config eval.yaml",
        "With two folders, A and B: those of two evaluations are compared as they are; models and runs\nare "
        "evaluated first, as --config says.",
    )  # fmt: skip
    evaluate.add_argument(
        "config", metavar="CONFIG_OR_A", type=path, help="YAML file; or A: an evaluation, a model or a run"
    )
    evaluate.add_argument(
        "overrides", metavar="B_OR_OVERRIDE", nargs="*", default=[], help=f"B, and overrides: {OVERRIDES}"
    )
    evaluate.add_argument(
        "--config", dest="how", metavar="CONFIG", type=path, help="how to evaluate A and B, where they are models"
    )
    _add_json(evaluate)


def _add_commands_on_configurations(commands: Commands) -> None:
    check = _add(
        commands, "check", _check, "find what is wrong with a configuration, without training",
        "hybridflow check recipes/carry/grpo.yaml\n  hybridflow check --explain optim.lr",
    )  # fmt: skip
    check.add_argument("config", nargs="?", type=path, help="YAML file (may be left out with --explain)")
    check.add_argument("overrides", nargs="*", default=[], help=OVERRIDES)
    check.add_argument("--explain", metavar="KEY", help="say what a key means, and what the configuration has there")
    _add_json(check)
    init = _add(
        commands, "init", _init, "write a commented configuration to begin with",
        "hybridflow init --model runs/carry-sft/model --data recipes/carry/task.py:problems \\\n"
        "    --reward recipes/carry/task.py:score --out my.yaml optim.lr=1e-4",
    )  # fmt: skip
    init.add_argument("overrides", nargs="*", default=[], help=f"keys to begin with: {OVERRIDES}")
    init.add_argument("--kind", choices=KINDS, default="train", help="for which command (default: train)")
    init.add_argument("--model", required=True, help="Hugging Face folder, org/name on the hub, or file.py:function")
    init.add_argument("--data", required=True, help=".jsonl or .parquet file, or file.py:function")
    init.add_argument("--reward", help="file.py:function, or the name of a built-in reward")
    init.add_argument(
        "--out", type=path, default="config.yaml", help="file to write; it must not exist (default: config.yaml)"
    )
    schema = _add(
        commands, "schema", _schema, "print the JSON schema of a configuration, for editors",
        "hybridflow schema train > train.schema.json",
    )  # fmt: skip
    schema.add_argument("kind", choices=KINDS, help="for which command")
    copies = _add(
        commands, "recipes", _recipes, "list the recipes that come with the package, or copy one",
        "hybridflow recipes\n  hybridflow recipes carry\n  hybridflow recipes carry my-carry",
        "A recipe is a folder with a README, configurations and a task. A copy never overwrites a file.",
    )  # fmt: skip
    copies.add_argument("recipe", nargs="?", metavar="NAME", choices=recipe_names(), help="which to copy")
    copies.add_argument("folder", nargs="?", type=path, help="folder to write (default: recipes/NAME)")
    _add_json(copies)
    complete = _add(
        commands, "completion", _completion, "print a script that completes commands, options and keys in a shell",
        'eval "$(hybridflow completion bash)"',
    )  # fmt: skip
    complete.add_argument("shell", choices=SHELLS, help="which shell")


def _add_commands_on_models(commands: Commands) -> None:
    generate = _add(
        commands, "generate", _generate, "ask a model", 'hybridflow generate runs/carry-grpo "347+586=" --max-tokens 32'
    )  # fmt: skip
    generate.add_argument("model", type=path, help="Hugging Face folder, run folder, or file.py:function")
    generate.add_argument("prompts", nargs="+", help="what to ask; each is one message of the user")
    generate.add_argument("--max-tokens", type=int, help="longest response (default 256, less in a short context)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    generate.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest tokens of this share")
    generate.add_argument("--top-k", type=int, default=0, help="sample among this many likeliest tokens; 0: all")
    generate.add_argument(
        "--min-p", type=float, default=0.0, help="sample among tokens this share as likely as the best"
    )
    generate.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less (default 1)")
    generate.add_argument("--stop", action="append", default=[], help="text that ends a response; may be repeated")
    generate.add_argument("--samples", type=int, default=1, help="responses to each prompt (default 1)")
    generate.add_argument("--seed", type=int, default=0, help="seed of the noise (default 0)")
    generate.add_argument(
        "--tools", action="append", default=[], type=path, help="tool to call, file.py:function; may be repeated"
    )
    generate.add_argument("--no-packing", action="store_true", help="for a family that cannot run packed; slower")
    generate.add_argument("--trust-remote-code", action="store_true", help="run code that the model's folder brings")
    _add_json(generate)
    export = _add(
        commands, "export", _export, "write a checkpoint as a plain Hugging Face folder",
        "hybridflow export runs/carry-grpo exported --dtype bfloat16",
        "It is a run's newest checkpoint, or that of --step, or the --best; adapters are merged.",
    )  # fmt: skip
    export.add_argument("run", type=path, help="folder of the run")
    export.add_argument("target", type=path, help="folder to write")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    which.add_argument("--best", action="store_true", help="the best one by checkpoint.best")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    export.add_argument("--adapter", action="store_true", help="write the adapters alone, in peft's format")
    _add_json(export)
    _add_audit(commands)
    doctor = _add(
        commands, "doctor", _doctor, "find what is wrong with this machine, before a job does", "hybridflow doctor",
        "It prints versions, devices, memory and ports, lets two processes sum a tensor, and ends with 1 if\n"
        "anything is wrong.",
    )  # fmt: skip
    _add_json(doctor)
    report = _add(
        commands, "report", _report, "write the report of a run: one HTML file", "hybridflow report runs/carry-grpo"
    )  # fmt: skip
    report.add_argument("run", type=path, help="folder of the run")
    _add_json(report)


def _add_audit(commands: Commands) -> None:
    audit = _add(
        commands, "audit-reward", _audit_reward, "find what a reward accepts, rejects or does that it should not",
        "hybridflow audit-reward gsm8k\n"
        "  hybridflow audit-reward my_reward.py:score --data rows.jsonl --right '#### {ground_truth}'",
        "Right and wrong responses are changed in many ways and scored. It ends with 1 where wrong ones are\n"
        "accepted, or the reward fails, is not deterministic, or changes what it is given; docs/audit.md says more.",
    )  # fmt: skip
    audit.add_argument(
        "reward", type=path, help="name of a built-in reward, file.py:function, or the address of a server"
    )
    audit.add_argument(
        "--data", metavar="ROWS", type=path, help="rows with ground truths: .jsonl, .parquet or file.py:function"
    )
    audit.add_argument("--rows", type=int, default=50, help="at most this many of them (default 50)")
    audit.add_argument("--prompt-key", default="prompt", help="as data.prompt_key (default: prompt)")
    audit.add_argument("--ground-truth-key", default="ground_truth", help="as data.ground_truth_key")
    given = audit.add_mutually_exclusive_group()
    given.add_argument("--response-key", metavar="KEY", help="column with right responses")
    given.add_argument("--right", metavar="FORM", help="how a right response looks, with {ground_truth} in it")
    audit.add_argument("--kwargs", metavar="JSON", type=json.loads, default={}, help="as reward.kwargs")
    audit.add_argument(
        "--allow", metavar="MUTATION", action="append", default=[], help="a change to ignore; may be repeated"
    )
    audit.add_argument("--processes", type=int, default=1, help="as reward.pool.processes (default 1)")
    audit.add_argument("--timeout", type=float, default=30.0, help="seconds for one call (default 30)")
    _add_json(audit)


def _add_prepare(commands: Commands) -> None:
    prepare = _add(
        commands, "prepare", _prepare, "write a known data set as rows to train on",
        "hybridflow prepare gsm8k --from FOLDER --out data/gsm8k",
        "It becomes train.parquet and test.parquet, in verl's schema of rows.",
    )  # fmt: skip
    prepare.add_argument("set", help="which data set, for example gsm8k (an unknown name lists all)")
    prepare.add_argument(
        "--from", dest="source", metavar="FOLDER_OR_HUB", type=path,
        help="folder with the set's files, or a name on the Hugging Face hub (default: the set's own name there)",
    )  # fmt: skip
    prepare.add_argument("--out", required=True, type=path, help="folder to write")
    prepare.add_argument("--rows", type=int, help="at most this many rows of each split (default: all)")
    prepare.add_argument("--seed", type=int, default=0, help="for the choice of these, and for sets made here")
    _add_json(prepare)


def _load(given: argparse.Namespace, kind: Kind) -> Any:
    try:
        return load_config(given.config, given.overrides, kind=kind.config)
    except UserError:
        for name, other in KINDS.items():
            if other is not kind and _loads(other, given):
                raise UserError(f"{given.config} is for another command", fix=typed(name, given.config)) from None
        raise


def _loads(kind: Kind, given: argparse.Namespace) -> bool:
    try:
        load_config(given.config, given.overrides, kind=kind.config)
    except UserError:
        return False
    return True


def _train(given: argparse.Namespace) -> int:
    config = _load(given, KINDS[given.name])  # first: a mistake in it is reported before torch is imported
    if resolved_placement(config.placement).backend == "processes":
        start_server(PRELOAD)  # it imports torch for all processes while this one does
    from hybridflow.commands.train import start

    return start(config, again=given.again)


def _eval(given: argparse.Namespace) -> int:
    if _compares(given):
        return _compare(given)
    one = typed("eval", given.how or "eval.yaml", f"model.path={given.config}")
    if given.how is not None:
        raise UserError(
            "--config says how to evaluate two models",
            fix=f"hybridflow eval A B --config {given.how}, or, for one: {one}",
        )
    if any((Path(given.config) / file).is_file() for file in ("metrics.jsonl", "config.json")):
        raise UserError(f"{given.config} is a folder, and a configuration says how to evaluate it", fix=one)
    config = _load(given, KINDS["eval"])
    from hybridflow.commands.evaluate import evaluate_model, evaluation_lines

    result = evaluate_model(config, note=_aside)
    _tell(given, result, evaluation_lines(result))
    return 0


def _compares(given: argparse.Namespace) -> bool:
    """Returns whether the arguments are two models or folders, instead of a configuration and overrides."""
    if not given.overrides or Path(given.config).is_file():
        return False
    return "=" not in given.overrides[0] or Path(given.overrides[0]).exists()


def _compare(given: argparse.Namespace) -> int:
    second, *overrides = given.overrides
    second = str(home(second))
    if overrides and given.how is None:
        raise UserError(f"{overrides[0]!r} changes a configuration, and none is given", fix="add --config eval.yaml")
    config = None if given.how is None else load_config(given.how, overrides, kind=EvalConfig)
    from hybridflow.commands.compare import compare, comparison_lines

    result = compare(given.config, second, config, note=_aside)
    _tell(given, result, comparison_lines(result))
    return 0


def _check(given: argparse.Namespace) -> int:
    if given.explain is not None:
        return _explain(given)
    if given.config is None:
        raise UserError("no configuration is given", fix="hybridflow check CONFIG, or hybridflow check --explain KEY")
    kind = _kind_of(Path(given.config))
    config = _load(given, kind)
    from hybridflow.commands.check import check

    said = []
    for line in check(config):
        said.append(line)
        if not given.json:
            print(line)
    result = {"command": kind.name, "checks": said, "config": config.model_dump(mode="json")}
    _tell(given, result, ["all checks passed"])
    return 0


def _explain(given: argparse.Namespace) -> int:
    from hybridflow.config.pages.explain import explain, explanation_lines

    path = None if given.config is None else Path(given.config)
    described = explain(given.explain, path, given.overrides)
    _tell(given, described, explanation_lines(described, path))
    return 0


def _kind_of(path: Path) -> Kind:
    """Returns the kind of run that a file configures, by the sections it has."""
    from hybridflow.config.load import read_values
    from hybridflow.config.pages.explain import kind_of

    return KINDS[kind_of(read_values(path))]


def _init(given: argparse.Namespace) -> int:
    from hybridflow.config.pages.starter import starter

    target = Path(given.out)
    if target.exists():
        raise UserError(f"{target} exists already", fix="give another file with --out")
    name = given.kind if target.stem == "config" else target.stem
    text = starter(
        given.kind, file=str(target), folder=f"runs/{name}", model=given.model, data=given.data, reward=given.reward,
        overrides=given.overrides,
    )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    print(f"wrote {target}; next: {typed('check', target)}")
    return 0


def _schema(given: argparse.Namespace) -> int:
    from hybridflow.config.pages.schema import schema

    print(schema(given.kind), end="")
    return 0


def _recipes(given: argparse.Namespace) -> int:
    if given.recipe is None:
        _tell(given, [recipe.values() for recipe in recipes()], recipe_lines())
        return 0
    if given.folder == "":
        raise UserError("the folder to write is empty text", fix=f"leave it out: {typed('recipes', given.recipe)}")
    target, recipe = copy_recipe(given.recipe, None if given.folder is None else Path(given.folder))
    lines = [f"wrote {target}: {', '.join(recipe.files)}", "next:", *(f"  {command}" for command in recipe.commands)]
    _tell(given, {"folder": str(target), **recipe.values()}, lines)
    return 0


def _completion(given: argparse.Namespace) -> int:
    actions = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    print(completion(given.shell, next(actions).choices), end="")
    return 0


def _tell(given: argparse.Namespace, result: Any, lines: Iterable[str]) -> None:
    """Prints a result as JSON where --json asks for it, else its lines."""
    if given.json:
        print(json.dumps(result, indent=1))
        return
    for line in lines:
        print(line)


def _aside(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _generate(given: argparse.Namespace) -> int:
    from hybridflow.commands.generate import ask
    from hybridflow.protocols.generation import Sampling

    sampling = Sampling(
        0, given.temperature, top_p=given.top_p, top_k=given.top_k, min_p=given.min_p, stop=tuple(given.stop),
        repetition_penalty=given.repetition_penalty,
    )  # fmt: skip
    several = len(given.prompts) * given.samples > 1
    for answer in ask(
        given.model, given.prompts, max_tokens=given.max_tokens, sampling=sampling,
        samples=given.samples, seed=given.seed,
        packing=not given.no_packing, trust_remote_code=given.trust_remote_code, tools=given.tools,
    ):  # fmt: skip
        between = "\n" if given.tools else ""
        text = f"{answer.prompt}{between}{answer.line()}" if several else answer.line()
        print(json.dumps(asdict(answer)) if given.json else text)
    return 0


def _export(given: argparse.Namespace) -> int:
    from hybridflow.commands.export import export

    which = {"step": given.step, "best": given.best}
    done = export(Path(given.run), Path(given.target), **which, dtype=given.dtype, adapter=given.adapter)
    _tell(given, done, [f"wrote {done['folder']}"])
    return 0


def _audit_reward(given: argparse.Namespace) -> int:
    from hybridflow.commands.audit_reward import AuditOptions, AuditRows, audit_reward
    from hybridflow.config.sections.rewards import RewardPoolSection

    rows = None
    if given.data is not None:
        rows = AuditRows(
            given.data, given.rows, given.prompt_key, given.ground_truth_key, given.response_key, given.right
        )
    pool = RewardPoolSection(processes=given.processes, timeout=given.timeout)
    report = audit_reward(given.reward, rows, AuditOptions(given.kwargs, pool, given.allow))
    _tell(given, report.values(), report.lines())
    return 0 if report.ok else 1


def _doctor(given: argparse.Namespace) -> int:
    from hybridflow.commands.doctor import examine

    found = []
    for finding in examine():
        found.append(finding)
        if not given.json:
            print(finding.line(), flush=True)
    problems = sum(finding.mistake is not None for finding in found)
    result = {"ok": not problems, "checks": [finding.values() for finding in found]}
    _tell(given, result, [f"{problems} problem{'s' * (problems > 1)}" if problems else "all is well"])
    return min(problems, 1)


def _prepare(given: argparse.Namespace) -> int:
    from hybridflow.data.prepare.prepare import prepare

    said = list(prepare(given.set, given.source, Path(given.out), rows=given.rows, seed=given.seed))
    _tell(given, {"set": given.set, "folder": given.out, "said": said}, said)
    return 0


def _report(given: argparse.Namespace) -> int:
    from hybridflow.viewer.report import write_report

    folder = Path(given.run)
    if not (folder / "metrics.jsonl").is_file():
        if (folder / "evaluation.json").is_file():
            raise UserError(
                f"{folder} holds an evaluation, not a run: there are no steps to report",
                fix=f"read {folder / 'evaluation.json'}, or compare it with another: {typed('eval', folder)} OTHER",
            )
        runs = [str(p.parent) for p in folder.parent.glob("*/metrics.jsonl")]
        raise UserError(f"{folder} is not the folder of a run", fix=nearest(str(folder), runs) if runs else "")
    path = write_report(folder)
    _tell(given, {"report": str(path)}, [f"wrote {path}"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
