"""--help of every verb is readable and does not import torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_lion.cli import VERBS

REPO = Path(__file__).resolve().parents[2]
SCRIPT = """
import contextlib, io, json, sys
from megatron_lion.cli import VERBS, main
texts = {}
for verb in VERBS:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main([verb, "--help"])
        except SystemExit as end:
            assert end.code == 0, end.code
    texts[verb] = out.getvalue()
assert "torch" not in sys.modules and "numpy" not in sys.modules, "help waits for heavy imports"
print(json.dumps(texts))
"""


def test_help_is_readable_and_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=REPO, check=False)
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout)
    assert set(texts) == set(VERBS)
    for verb, text in texts.items():
        assert f"megatron-lion {verb}" in text, verb
        assert "<function" not in text, verb
        assert " at 0x" not in text, verb
