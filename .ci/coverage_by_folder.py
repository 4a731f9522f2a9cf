"""Prints the line coverage of each folder, and the total, from coverage's data file.

    python .ci/coverage_by_folder.py [DATA_FILE]

Exit code 1 if there is no data.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import coverage
from coverage.exceptions import CoverageException

REPO = Path(__file__).resolve().parent.parent


def by_folder(data_file: str) -> dict[str, tuple[int, int]]:
    """(statements, executed statements) of each folder with source files, by its path in the repository."""
    measured = coverage.Coverage(data_file=data_file, config_file=str(REPO / "pyproject.toml"))
    measured.load()
    if not measured.get_data().measured_files():
        raise CoverageException(f"{data_file}: no data; run the tests with --cov first")
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path in sorted((REPO / "megatron_lion").rglob("*.py")):
        # A file that no test imports is missing from the data; analysis2 counts it as not covered.
        _, statements, _, missing, _ = measured.analysis2(str(path))
        folder = path.parent.relative_to(REPO).as_posix()
        counts[folder][0] += len(statements)
        counts[folder][1] += len(statements) - len(missing)
    return {folder: (statements, executed) for folder, (statements, executed) in sorted(counts.items())}


def main(data_file: str = ".coverage") -> int:
    try:
        counts = by_folder(data_file)
    except CoverageException as error:
        print(f"coverage: {error}", file=sys.stderr)
        return 1
    totals = [sum(column) for column in zip(*counts.values(), strict=True)]
    print(f"{'folder':<34}{'statements':>12}{'executed':>10}{'coverage':>10}")
    for folder, (statements, executed) in {**counts, "total": (totals[0], totals[1])}.items():
        print(f"{folder:<34}{statements:>12}{executed:>10}{executed / max(statements, 1):>10.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
