"""Documentation is in step with the code: commands parse, paths and keys exist, links resolve, examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import pkgutil
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

import hybridflow
from hybridflow.checkpoint.run_folder import FIXED_KEYS
from hybridflow.cli.main import _compares, _kind_of, _parser
from hybridflow.commands.check import check
from hybridflow.config.kinds.eval import EvalConfig
from hybridflow.config.kinds.registry import KINDS
from hybridflow.config.load import load_config
from hybridflow.config.names import meaning
from hybridflow.config.pages.describe import describe
from hybridflow.config.pages.explain import explain

from tiny import CARRY

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "recipes").glob("*/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
TOP = ("src/", "tests/", "recipes/", "benchmarks/", "docs/", "examples/", "scripts/", ".ci/")
ELSEWHERE = ("my/", "runs/", "benchmarks/results/")  # files of the reader, and what a run or a benchmark writes
SHELL = ("sh", "bash", "console")
PROGRAMS = ("make", "hybridflow", "python", ".", ".venv/bin/pre-commit", "pip")
SETTING = re.compile(r"[a-z_]+(?:\.[a-z_]+)+=")

WITH_FILES = ("docs/getting-started.md", "docs/extending.md")  # whose files other pages speak of

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks in one of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [text for language, text in found if language in languages]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def quoted(page: Path) -> list[str]:
    """What stands between backticks, outside of blocks."""
    return re.findall(r"`([^`]+)`", prose(page))


def commands(page: Path) -> Iterator[list[str]]:
    """The command lines of a page, in blocks and in the running text, without environment variables before them."""
    lines = [line for block in blocks(page, *SHELL) for line in block.splitlines() if line.strip()]
    lines += [q for q in quoted(page) if q.split()[0] in ("make", "hybridflow", "python") and len(q.split()) > 1]
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if ">" in words:
            words = words[: words.index(">")]
        if words:
            yield words


def written_files(page: Path, folder: Path) -> None:
    """Writes the files that a page tells the reader to make: a path between backticks, a colon, a block."""
    for name, text in re.findall(
        r"`(my/[\w./]+)`[^`\n]*:\n\n```\w+\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


@pages
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for page_with_files in (*WITH_FILES, page):
        written_files(ROOT / page_with_files, tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        program, arguments = words[0], words[1:]
        assert program in PROGRAMS, words
        if program == "hybridflow":
            hybridflow_command(arguments)
        elif program == "make":
            make_command(arguments)
        elif program == "python":
            python_command(arguments)


def hybridflow_command(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        return
    if len(arguments) == 1:  # named in the text without what it works on
        arguments = [*arguments, "--help"]
    if "--help" in arguments:
        with pytest.raises(SystemExit) as ended:
            _parser().parse_args(arguments)
        assert ended.value.code == 0, arguments
        return
    given = _parser().parse_args(arguments)
    if given.name == "eval" and _compares(given):
        if given.how is not None:
            load_config(given.how, given.overrides[1:], kind=EvalConfig)
    elif given.name == "init" and given.out.startswith("my/"):  # what it writes is used by the next command
        assert given.command(given) == 0
    elif getattr(given, "explain", None) is not None:
        assert given.explain == "KEY" or explain(given.explain)
    elif given.name in (*KINDS, "check"):
        kind = KINDS.get(given.name) or _kind_of(Path(given.config))
        load_config(given.config, given.overrides, kind=kind.config)


@cache
def makefile() -> tuple[set[str], set[str]]:
    """The targets and the variables that a user may set."""
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z-]+):", text, re.M)), set(re.findall(r"^([A-Z_]+) \?=", text, re.M))


def make_command(arguments: list[str]) -> None:
    targets, variables = makefile()
    for word in arguments:
        name, sign, _ = word.partition("=")
        assert name in variables | {"NAME"} if sign else name in targets, arguments


def python_command(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None, arguments
        return
    assert (ROOT / arguments[0]).is_file(), arguments
    if arguments[0] == "recipes/carry/grpo.py":
        load_config("recipes/carry/grpo.yaml", arguments[1:])


@pages
def test_paths_exist(page: Path) -> None:
    for text in quoted(page):
        path, _, name = text.partition("::")
        if not path.startswith(TOP) or path.startswith(ELSEWHERE) or " " in path or path.endswith("/..."):
            continue
        assert (ROOT / path).exists(), f"{page.name}: {text}"
        if name:
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M), f"{page.name}: {text}"


@pages
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page.name}: {target}"


@cache
def keys() -> frozenset[str]:
    """Every configuration key and section."""
    found = set(re.findall(r"^\| `([a-z_.]+)` \|", describe(), re.M))
    return frozenset(found | {key.rpartition(".")[0] for key in found})


@pages
def test_quoted_keys_are_keys(page: Path) -> None:
    sections = {key.split(".")[0] for key in keys()}
    endings = (".py", ".yaml", ".md", ".jsonl", ".json", ".html", ".parquet")
    for text in quoted(page):
        key = SETTING.match(text)
        name = key[0].removesuffix("=") if key else text
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name) and name.split(".")[0] in sections and name != "section.key":
            theirs = page.name.startswith("coming-from-") and meaning(name) is not None
            assert theirs or name in keys() or name.endswith(endings) or name in CHECKPOINT_VALUES, f"{page}: {text}"


def test_metrics_that_the_symptoms_name_are_metrics() -> None:
    known = {name for name in quoted(ROOT / "docs/metrics.md") if "/" in name}
    families = {name.partition("/")[0] for name in known}
    named = {name for name in quoted(ROOT / "docs/faq.md") if name.partition("/")[0] in families and name[-1] != "/"}
    assert len(named & known) > 20
    assert named - known - families == set()


def test_messages_that_the_symptoms_quote_are_the_ones_that_a_run_prints() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # literals over several lines
    said = [part for text in re.findall(r'"([^"\n]{6,})"', prose(ROOT / "docs/faq.md")) for part in text.split(" ... ")]
    assert len(said) > 10
    assert [part for part in said if part not in joined] == []


CHECKPOINT_VALUES = ("run.drawn", "run.data", "run.recent", "run.unevaluated")  # names in a checkpoint's state.json


@pages
def test_python_blocks_compile_and_their_doctests_pass(page: Path) -> None:
    for text in blocks(page, "python"):
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hybridflow"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        if ">>>" in text:
            scope: dict[str, object] = {"__name__": "block"}
            exec(compile(text, str(page), "exec"), scope)
            example = doctest.DocTestParser().get_doctest(text, scope, page.name, str(page), 0)
            assert doctest.DocTestRunner().run(example).failed == 0


@pages
def test_yaml_blocks_are_configurations(page: Path) -> None:
    for text in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(text), dict)


def test_the_readme_shows_the_recipe_program_as_it_is() -> None:
    program = (CARRY.parent / "grpo.py").read_text()
    shown = next(block for block in blocks(ROOT / "README.md", "python") if "open_run" in block)
    assert shown.strip() in program


def test_the_architecture_can_be_read_in_a_quarter_of_an_hour() -> None:
    assert len((ROOT / "docs/architecture.md").read_text().split()) <= 3_000


def test_the_first_page_names_every_package_and_is_short() -> None:
    page = (ROOT / "docs/index.md").read_text()
    packages = {path.parent.name for path in (ROOT / "src/hybridflow").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `([a-z]+)/` \|", page, re.M)) == packages
    assert len(page.split()) < 900


def test_the_architecture_shows_the_loop_as_it_is() -> None:
    source = (ROOT / "src/hybridflow/trainers/rl/loop.py").read_text()
    shown = blocks(ROOT / "docs/architecture.md", "python")[0]
    assert "".join(f"    {line}\n" for line in shown.splitlines()) in source


def test_the_readers_own_job_passes_its_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for page_with_files in WITH_FILES:
        written_files(ROOT / page_with_files, tmp_path)
    monkeypatch.chdir(tmp_path)
    said = list(check(load_config("my/train.yaml", [f"model.path={CARRY}:tiny_qwen3"])))
    assert any("3 rows" in line for line in said)
    assert any(line.endswith("given as the response scores 1") for line in said)


def test_the_recipe_page_has_the_numbers_of_the_recipe() -> None:
    page = (CARRY.parent / "README.md").read_text()
    rows = {
        name.strip(): (sft, rl) for name, sft, rl in re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", page, re.M)
    }
    sft, rl = (yaml.safe_load((CARRY.parent / name).read_text()) for name in ("sft.yaml", "grpo.yaml"))
    for said, config in zip(rows["Steps"], (sft, rl)):
        assert str(config["train"]["steps"]) in said
    assert str(sft["train"].get("stop_below_loss", "")) in rows["Steps"][0]
    assert str(sft["train"]["sequences_per_update"]) in rows["A step"][0]
    assert (
        f"{rl['train']['prompts_per_step']} problems x {rl['train']['samples_per_prompt']} responses"
        in rows["A step"][1]
    )
    for said, config in zip(rows["AdamW"], (sft, rl)):
        assert f"lr {config['optim']['lr']}, betas {', '.join(map(str, config['optim']['betas']))}" == said.strip()


def test_the_page_of_keys_is_in_step() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    assert page == describe(), "run: python -m hybridflow.config.pages.describe > docs/configuration.md"
    assert all(f"`{key}`" in page or key == "data" for key in FIXED_KEYS)


def test_doctests_of_the_source_pass() -> None:
    tried = 0
    for info in pkgutil.walk_packages(hybridflow.__path__, "hybridflow."):
        source = importlib.util.find_spec(info.name)
        assert source is not None
        assert source.origin is not None
        if ">>>" in Path(source.origin).read_text(encoding="utf-8"):
            result = doctest.testmod(importlib.import_module(info.name))
            assert result.failed == 0, info.name
            tried += result.attempted
    assert tried >= 4
