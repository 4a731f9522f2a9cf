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


def instructions_of(kernel: Any) -> list[tuple[int, str]]:
    """Returns (address, text) of every machine instruction of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return [(int(address, 16), body) for address, body in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text)]


def longest_path(instructions: list[tuple[int, str]], holding: str) -> list[str]:
    """Returns the instructions that a thread executes on its longest way to the end past an instruction that matches `holding`.

    No instruction is taken twice, and calls are not followed: the compiler calls its division of subnormal numbers.
    """
    index = {address: number for number, (address, _) in enumerate(instructions)}
    longest: list[str] = []
    ways = [(0, [], frozenset[int]())]  # next instruction, texts so far, numbers so far
    while ways:
        number, path, seen = ways.pop()
        while number < len(instructions) and number not in seen:
            text = instructions[number][1]
            path, seen = [*path, text], seen | {number}
            match = re.match(r"(@!?U?P\w+ )?(BRA|EXIT)\b(?:\.\w+)*( !?U?P\d)?", text)
            always = match is not None and not match.group(1) and not match.group(3)
            if match is not None and match.group(2) == "EXIT" and always:
                if len(path) > len(longest) and any(re.search(holding, one) for one in path):
                    longest = path
                break
            number += 1
            if match is not None and match.group(2) == "BRA":
                target = index[int(text.rsplit("0x", 1)[1], 16)]
                if always:
                    number = target
                else:
                    ways.append((target, path, seen))
    return longest
