"""Copies configs/ and launch/ into the built package, and gives README.md without links that need a checkout.

All other settings are in pyproject.toml.
"""

import re
import tomllib
from pathlib import Path
from shutil import copy2

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
_CODE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)[^\n]*$|^ {4}[^\n]*$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
_IMAGE = re.compile(r"!\[([^\]]*)\]\(\s*([^)\s]+)[^)]*\)")
_TAG = re.compile(r"<img\b[^>]*?\bsrc=\"([^\"]+)\"[^>]*>")
_LINK = re.compile(r"\[([^\[\]]*)\]\(\s*([^)\s]+)[^)]*\)")


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


def long_description(text, repository=None):
    """Returns Markdown whose links work on a page of a package index.

    A relative link becomes absolute if the repository's address is known, else its text alone. A relative image becomes
    its description. Code stays as it is.
    """

    def link(match):
        shown, target = match[1], match[2]
        if _URL.match(target):
            return match[0]
        return f"[{shown}]({repository.rstrip('/')}/blob/main/{target})" if repository else shown

    def image(match):
        return match[0] if _URL.match(match[2]) else match[1] and f"*{match[1]}*"

    def tag(match):
        described = re.search(r"\balt=\"([^\"]*)\"", match[0])
        return match[0] if _URL.match(match[1]) else (described[1] if described else "")

    parts = _CODE.split(text)  # code at odd places
    parts[::2] = [_LINK.sub(link, _IMAGE.sub(image, _TAG.sub(tag, part))) for part in parts[::2]]
    return "".join(parts)


if __name__ == "__main__":
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    setup(
        cmdclass={"build_py": BuildWithShippedFiles},
        long_description=long_description((ROOT / "README.md").read_text(encoding="utf-8"), urls.get("Repository")),
        long_description_content_type="text/markdown",
    )
