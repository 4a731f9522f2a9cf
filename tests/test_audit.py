""".ci/audit.py: vulnerable packages fail, accepted ones do not, and a place without the service is reported."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent
FAULT = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"]}
CLEAN = {"name": "one", "version": "1.0", "vulns": []}
HIT = {"name": "two", "version": "1.0", "vulns": [FAULT]}
UNKNOWN = {"name": "three", "skip_reason": "Dependency not found on PyPI"}


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("audit", REPO / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answering(monkeypatch: pytest.MonkeyPatch, script: Any, answers: dict[str, Any]) -> None:
    """Replaces pip-audit by a table: the packages of a service, or an exception."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert options["timeout"] > 0
        answer = answers[command[command.index("--vulnerability-service") + 1]]
        if isinstance(answer, Exception):
            raise answer
        text = answer if isinstance(answer, str) else json.dumps({"dependencies": answer})
        return subprocess.CompletedProcess(command, 0, stdout=text, stderr="")

    monkeypatch.setattr(script.subprocess, "run", run)


@pytest.mark.parametrize(
    ("pypi", "osv", "code"),
    [
        ([CLEAN], [], 0),
        ([CLEAN, HIT], [], 1),
        ([CLEAN, UNKNOWN], [HIT], 0),
        ([UNKNOWN], [HIT], 1),
        (subprocess.TimeoutExpired("pip-audit", 1), [HIT], 1),
        ("", [CLEAN], 0),
    ],
)
def test_the_first_service_that_knows_a_package_decides(
    monkeypatch: pytest.MonkeyPatch, script: Any, capsys: pytest.CaptureFixture[str], pypi: Any, osv: Any, code: int
) -> None:
    answering(monkeypatch, script, {"pypi": pypi, "osv": osv})
    assert script.main([]) == code
    found = capsys.readouterr()
    assert "packages audited" in found.out
    assert "WARNING" not in found.err
    assert ("two 1.0: PYSEC-1, fixed in 2.0" in found.out) == (code == 1)


@pytest.mark.parametrize("name", ["PYSEC-1", "CVE-1"])
def test_an_accepted_vulnerability_is_printed_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, script: Any, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    answering(monkeypatch, script, {"pypi": [HIT], "osv": []})
    monkeypatch.setattr(script, "KNOWN", {name: "the function is not called"})
    assert script.main([]) == 0
    assert "accepted: the function is not called" in capsys.readouterr().out


@pytest.mark.parametrize("answer", ["", [UNKNOWN], subprocess.TimeoutExpired("pip-audit", 1)])
def test_without_a_service_one_loud_line(
    monkeypatch: pytest.MonkeyPatch, script: Any, capsys: pytest.CaptureFixture[str], answer: Any
) -> None:
    answering(monkeypatch, script, {"pypi": answer, "osv": answer})
    assert script.main([]) == 0
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert "NOT AUDITED" in found.err


def test_without_pip_audit_it_fails(monkeypatch: pytest.MonkeyPatch, script: Any) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="python: No module named pip_audit")

    monkeypatch.setattr(script.subprocess, "run", run)
    with pytest.raises(SystemExit, match="make setup EXTRA=ci"):
        script.main([])
