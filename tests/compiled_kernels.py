"""Compiles Triton kernels for GPUs that are not there, and reads what the compiler made of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def run_compiling(script: str, cases: Any) -> Any:
    """Runs a script in a new process, with Triton's compiler in place of its interpreter; returns the JSON that it prints.

    Args:
        script: Python source; it reads the cases from sys.argv[1], as JSON, and may import this module.
        cases: what to compile.
    """
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(cases)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def usage_of(kernel: Any) -> dict[str, int]:
    """Returns a compiled kernel's registers a thread, and its bytes of stack (spills) and of shared memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: re.search(rf"{name}:(\d+)", done.stdout + done.stderr) for name in ("REG", "STACK")}
    registers, stack = (int(match.group(1)) for match in found.values() if match is not None)
    return {"registers": registers, "stack": stack, "shared": int(kernel.metadata.shared)}
