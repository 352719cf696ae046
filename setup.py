"""Everything about the package is in pyproject.toml; this puts the demo model and its pictures, which lie beside the
source folders, into the wheel as deixis/models. An editable install finds them where they are.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

MODELS = ("tabletop", "pictures")  # the checkpoint is not shipped


class BuildWithModels(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "deixis" / "models"
        shutil.rmtree(target, ignore_errors=True)
        for name in MODELS:
            source = Path(__file__).parent / "models" / name
            if source.is_dir():
                shutil.copytree(source, target / name)


setup(cmdclass={"build_py": BuildWithModels})
