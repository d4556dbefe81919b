"""Puts the recipes into a wheel: `recipes/` stands at the root of the repository, outside of the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Builds the package, with the files of each recipe in `hybridflow/recipes`."""

    def run(self) -> None:
        """Copies them; an editable installation finds them in the repository."""
        super().run()
        if self.editable_mode:
            return
        for file in sorted(Path("recipes").glob("*/*")):
            if file.is_file():
                target = Path(self.build_lib) / "hybridflow" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


setup(cmdclass={"build_py": BuildWithRecipes})
