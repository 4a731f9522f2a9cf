"""Fetches the packages that a GPU machine without a package index lacks, for copying with the checkout.

    python benchmarks/gpu_wheels.py --output wheels
    PYTHONPATH=.:wheels python benchmarks/gpu.py --output gpu-results          # on the machine, from the checkout's root

The machine must have Python 3.12 on Linux x86-64 with torch ≥ 2.11, triton, numpy, scipy, transformers, tokenizers, rich,
PyYAML, psutil and pytest. Unless `--required-only` is given, the pure-Python optimizers that stage `peers` compares are
included. The folder also contains the dataset of stage `run` and the commit of this checkout.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import CARRIED as MARK
from measuring import commit, source_digest

ROOT = Path(__file__).resolve().parent.parent
# Versions are those of constraints.txt for packages that the project itself needs.
REQUIRED = ("megatron-core", "jsonargparse", "docstring_parser")
OPTIONAL = ("lion-pytorch", "emerging-optimizers", "typeshed_client==2.15.0", "flashoptim==0.1.4")
# megatron-core's wheel contains a compiled helper, so it has platform tags; pip needs every tag that it may have.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder to create; a folder that this script made earlier is replaced",
    )
    parser.add_argument("--required-only", action="store_true", help=f"only {', '.join(REQUIRED)}")
    parser.add_argument(
        "--with", dest="more", nargs="+", default=[], metavar="PACKAGE", help="more packages, e.g. bitsandbytes"
    )
    parser.add_argument("--no-data", action="store_true", help="omit the dataset; gpu.py then makes it, in ten seconds")
    args = parser.parse_args()
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output}: not a folder")
    if args.output.exists() and any(args.output.iterdir()) and not (args.output / MARK).exists():
        parser.error(f"--output {args.output}: not empty and not made by this script; choose another folder")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # Made under a temporary name and renamed at the end: a call without a network must not destroy an earlier folder.
    folder = Path(tempfile.mkdtemp(prefix="wheels-", dir=args.output.parent))
    try:
        if reason := fill(folder, args):
            sys.stderr.write(f"gpu_wheels.py: {reason}\n")
            return 1
        shutil.rmtree(args.output, ignore_errors=True)
        folder.chmod(0o755)
        folder.rename(args.output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    sys.stdout.write(f"{args.output}: {size / 2**20:.1f} MiB, commit {(args.output / MARK).read_text().split()[0]}\n")
    return 0


def fill(folder: Path, args: argparse.Namespace) -> str | None:
    """Writes packages, dataset and commit into a folder; returns the reason if something required is missing."""
    (folder / MARK).write_text(f"{commit()} {source_digest()}\n")
    for package in [*REQUIRED, *([] if args.required_only else OPTIONAL), *args.more]:
        if not fetch(pinned(package), folder):
            if package in REQUIRED:
                return f"{package} cannot be fetched, and the GPU check needs it; run this where pip reaches a package index"
            sys.stderr.write(f"omitted: {package} cannot be fetched as a wheel\n")
    if not args.no_data:
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_data.py"), str(folder / "gpu_data")]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return f"the dataset cannot be made here ({last}); install the project first, or use --no-data"
    return None


def pinned(package: str) -> str:
    """The requirement of a package, with the version of constraints.txt if it is listed there."""
    name = re.sub("[-_]", "[-_]", package) if "==" not in package else "$^"
    found = re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE | re.IGNORECASE)
    return f"{package}=={found[1]}" if found else package


def fetch(package: str, output: Path) -> bool:
    """Unpacks one wheel without its dependencies into the folder; returns whether that worked."""
    target = ["--python-version", "3.12", "--implementation", "cp", "--only-binary", ":all:"]
    target += [word for tag in PLATFORMS for word in ("--platform", tag)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile",
               "--upgrade", "--target", str(output), *target, package]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    if done.returncode:
        sys.stderr.write("\n".join(errors[-2:] or done.stderr.splitlines()[-2:]) + "\n")
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
