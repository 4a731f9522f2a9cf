"""Compares the pinned packages with the published vulnerabilities, by pip-audit; warns if no service answers.

    python .ci/audit.py [constraints.txt]

Exit code: 0 if no pinned package has a vulnerability that is not listed in KNOWN, or if no vulnerability service can be
reached, which one line on stderr reports; 1 if one has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
SERVICES = ("pypi", "osv")
CONNECT_S = 5
LIMIT_S = 240
"""Seconds for a connection, and for one service as a whole: about 150 packages at a second each."""

KNOWN: dict[str, str] = {}
"""Vulnerabilities that are accepted: the identifier, and the reason."""


def ask(service: str, pins: Path) -> list[dict[str, Any]] | str:
    """Returns pip-audit's entry of each package, or the reason if the service does not answer."""
    command = [
        sys.executable, "-m", "pip_audit", "--requirement", str(pins), "--no-deps", "--disable-pip", "--format", "json",
        "--progress-spinner", "off", "--timeout", str(CONNECT_S), "--vulnerability-service", service,
    ]  # fmt: skip
    done = None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S, cwd=REPO)
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() if done is not None else []) or [f"no answer within {LIMIT_S} s"]
        if "No module named pip_audit" in reason[-1]:
            sys.exit("pip-audit is not installed; make setup EXTRA=ci installs it")
        return reason[-1]
    return found


def main(words: list[str]) -> int:
    """Audits a file of pinned packages; returns the exit code."""
    pins = Path(words[0]) if words else REPO / "constraints.txt"
    reasons = []
    for service in SERVICES:
        found = ask(service, pins)
        if isinstance(found, str):
            reasons.append(f"{service}: {found}")
            continue
        # A mirror of the package index answers without data on any package: pip-audit skips all and reports success.
        audited = [entry for entry in found if "skip_reason" not in entry]
        if audited:
            break
        reasons.append(f"{service}: it knows none of the packages")
    else:
        print(
            f"WARNING: no vulnerability service can be reached ({'; '.join(reasons)}): THE PACKAGES WERE NOT AUDITED",
            file=sys.stderr,
        )
        return 0
    wrong = 0
    for entry in audited:
        for item in entry["vulns"]:
            names = {item["id"], *item.get("aliases", [])}
            reason = next((KNOWN[name] for name in names if name in KNOWN), None)
            fixed = ", ".join(item.get("fix_versions", [])) or "no version"
            print(
                f"{entry['name']} {entry['version']}: {item['id']}, fixed in {fixed}"
                + (f" (accepted: {reason})" if reason else "")
            )
            wrong += reason is None
    skipped = sum("skip_reason" in entry for entry in found)
    print(
        f"{len(audited)} packages audited by {service}, {skipped} unknown there, {wrong} vulnerabilities not accepted"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
