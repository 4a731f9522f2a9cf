"""Turns an exception of torch or Python about missing memory into one line that names what to make smaller."""

from __future__ import annotations

import re

from megatron_lion.errors import EnvironmentFault

_CPU = re.compile(r"DefaultCPUAllocator: can't allocate memory: (you tried to allocate \d+ bytes)")
LESS = {
    "pretrain": "use a smaller train.micro_batch_size or more processes; a new run may also set model.recompute; "
    "--dry-run prints an estimate",
    "probe": "use more processes; the micro-batch is that of the run",
    "evaluate": "use a smaller --batch-size",
    "generate": "use a smaller --max-new-tokens or --count",
    "prepare": "use fewer --workers",
}


def memory_fault(error: BaseException, verb: str) -> EnvironmentFault | None:
    """Returns the error to report if memory ran out, or None if the exception has another reason.

    torch need not be imported: its class for device memory is recognised by name.

    Args:
        error: any exception.
        verb: the verb that ran.
    """
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":
        # torch's text continues with statistics and an advice on its allocator, which do not fit into one line.
        what = f"the device is out of memory: {'. '.join(text.split('. ')[:2])}"
    elif found := _CPU.search(text):
        what = f"this machine is out of memory: {found[1].removeprefix('you ')}"
    elif isinstance(error, MemoryError):
        what = "this machine is out of memory" + (f": {text}" if text else "")
    else:
        return None
    return EnvironmentFault(f"{what}; {LESS.get(verb, 'use smaller settings or a machine with more memory')}")
