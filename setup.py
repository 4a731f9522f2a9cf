"""Copies configs/ and launch/ into the built package; all settings are in pyproject.toml."""

from pathlib import Path
from shutil import copy2

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithShippedFiles(build_py):
    """`megatron_lion.shipped` finds the two folders inside the package if there is no checkout around it."""

    def run(self):
        super().run()
        if self.editable_mode:  # the checkout's own folders are used
            return
        for folder in ("configs", "launch"):
            target = Path(self.build_lib) / "megatron_lion" / folder
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted((ROOT / folder).iterdir()):
                copy2(path, target / path.name)

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        folders = (Path(self.build_lib) / "megatron_lion" / name for name in ("configs", "launch"))
        return [*outputs, *(str(path) for folder in folders if folder.is_dir() for path in folder.iterdir())]


setup(cmdclass={"build_py": BuildWithShippedFiles})
