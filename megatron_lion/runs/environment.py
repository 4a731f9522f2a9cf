"""Versions, hardware and git state of this machine; needs no packages."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from megatron_lion import __version__
from megatron_lion.installation import versions


def host_facts() -> dict[str, Any]:
    """Returns what can be found out without torch: time, versions, system, number of cores, git state of a checkout."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "megatron_lion": __version__, "python": platform.python_version(),
        "packages": versions(), "system": platform.platform(), "cpu_count": os.cpu_count(), "git": _git_state(),
    }  # fmt: skip


def _git_state() -> str | None:
    git = shutil.which("git")
    folder = Path(__file__).resolve().parents[2]
    if git is None or not (folder / ".git").exists():
        return None
    try:
        found = subprocess.run(
            [git, "describe", "--always", "--dirty"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
