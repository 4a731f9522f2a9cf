"""Shared by the benchmarks: the facts on which a figure depends, and the output of results."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "triton", "megatron-core", "lion-pytorch", "emerging-optimizers", "flashoptim", "bitsandbytes", "deepspeed",
    "transformer-engine",
)  # fmt: skip


def surroundings(device: str) -> dict[str, Any]:
    """Date, hardware, versions and commit.

    Args:
        device: "cpu" or "cuda".
    """
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    versions = {package: found for package in PACKAGES if (found := version_of(package)) is not None}
    return {
        "date": date.today().isoformat(), "device": name, "cores": os.cpu_count(), "commit": commit(),
        "python": platform.python_version(), "versions": versions, "load_average": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def heading(facts: dict[str, Any]) -> str:
    """`surroundings` in one line."""
    packages = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    load = f"{facts['cores']} cores, load average {facts['load_average']} at the start"
    return (
        f"{facts['date']}, {facts['device']} ({load}), commit {facts['commit']}, Python {facts['python']}, {packages}"
    )


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """Short hash of this checkout's commit, with + if files have changed; "unknown" without git."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False).stdout
        except OSError:  # a slim image has no git
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
    return (git("rev-parse", "--short", "HEAD").strip() or "unknown") + "+" * bool(changed)


CARRIED = "megatron_lion_commit.txt"
"""File in the wheels folder: the commit, and the digest of its sources."""


def source_digest() -> str:
    """SHA-256 (16 hexadecimal digits) of this checkout's Python, C++ and YAML files, to check a copy without git."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for folder in ("megatron_lion", "benchmarks", "configs"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".yaml") and path.is_file():
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def write_results(output: str | None, title: str, text: str, facts: dict[str, Any]) -> None:
    """Writes OUTPUT.md and OUTPUT.json unless `output` is empty."""
    if not output:
        return
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{output}.md").write_text(f"# {title}\n\n{text}", encoding="utf-8")
    Path(f"{output}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
