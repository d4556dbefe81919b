"""The recipes that come with the package: which there are, and a copy to work with.

A recipe is a folder: a README, configurations, and a task in Python. In a clone they are in `recipes/` at the root; an
installed package has them beside its modules. This module is light: it imports no torch.
"""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hybridflow.errors import UserError, nearest, typed

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "recipes", _PACKAGE.parents[1] / "recipes")  # of an installed package; of a clone


@dataclass(frozen=True)
class Recipe:
    """A recipe: its name, its first sentence, its files, and its commands, as the README gives them."""

    name: str
    about: str
    files: list[str]
    commands: list[str]

    def values(self) -> dict[str, Any]:
        """Returns the recipe as JSON holds it."""
        return asdict(self)


def recipe_names() -> list[str]:
    """Returns the names of all recipes; an installation without recipes has none."""
    return sorted(readme.parent.name for place in _PLACES for readme in place.glob("*/README.md"))


def recipes() -> list[Recipe]:
    """Returns all recipes.

    Raises:
        UserError: this installation has none.
    """
    names = recipe_names()
    if not names:
        raise UserError("this installation has no recipes", fix="install hybridflow again, from a clone or its wheel")
    return [_recipe(name) for name in names]


def recipe_lines() -> list[str]:
    """Returns the list of recipes for a reader."""
    lines = []
    for recipe in recipes():
        lines += [f"{recipe.name}: {recipe.about}", f"  files     {', '.join(recipe.files)}"]
        lines += [f"  {'' if i else 'commands':<9} {command}" for i, command in enumerate(recipe.commands)]
        lines += [f"  copy      {typed('recipes', recipe.name)}", ""]
    return [*lines, "A copy is written to recipes/NAME of the current folder, or to a folder that you name."]


def copy_recipe(name: str, folder: Path | None = None) -> tuple[Path, Recipe]:
    """Copies a recipe to work with, and returns where it is and the recipe with its commands for that place.

    Args:
        name: name of the recipe.
        folder: folder to write; None: `recipes/NAME` of the current one. It is made; it may exist if it is empty.

    Raises:
        UserError: there is no such recipe, the folder holds something, or it cannot be written.
    """
    if name not in recipe_names():
        raise UserError(f"there is no recipe {name}", fix=nearest(name, recipe_names()))
    recipe = _recipe(name)
    target = Path("recipes") / name if folder is None else folder
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(
                f"{target} exists already", why="a copy never overwrites a file",
                fix=f"give another folder: {typed('recipes', name, f'my-{name}')}",
            )  # fmt: skip
        target.mkdir(parents=True, exist_ok=True)
        for file in recipe.files:
            shutil.copyfile(_folder(name) / file, target / file)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}", fix="give another folder") from error
    here = partial(_moved, old=f"recipes/{name}/", new=f"{target.as_posix()}/")
    commands = [re.sub(r"\S+", here, command) for command in recipe.commands]
    return target, Recipe(name, recipe.about, recipe.files, commands)


def _moved(word: re.Match[str], old: str, new: str) -> str:
    """Returns a word of a command for a shell, with the folder of the copy."""
    return shlex.quote(word[0].replace(old, new)) if old in word[0] else word[0]


def _folder(name: str) -> Path:
    return next(place / name for place in _PLACES if (place / name / "README.md").is_file())


def _recipe(name: str) -> Recipe:
    folder = _folder(name)
    text = (folder / "README.md").read_text(encoding="utf-8")
    about = re.split(r"(?<=\.) (?=[A-Z])", " ".join(text.split("\n\n")[1].split()))[0]  # the first sentence
    blocks = [block for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) if f"recipes/{name}/" in block]
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    return Recipe(name, about, files, blocks[0].splitlines() if blocks else [])
