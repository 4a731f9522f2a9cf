"""`megatron-lion env`: versions and hardware as JSON, for bug reports."""

from __future__ import annotations

import json
import sys
from typing import Any

HELP = "Print versions, hardware and available kernels as JSON, for bug reports"


def add_arguments(parser: Any) -> None:
    """Declares the verb's flags."""
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")


def run(args: Any) -> None:
    """Prints the facts to stdout."""
    from megatron_lion.device import select_device
    from megatron_lion.jobs import world_size_from_env
    from megatron_lion.model.mcore_settings import choose_attention
    from megatron_lion.optim.triton_check import triton_kernel
    from megatron_lion.runs.folder import environment_facts

    device = select_device(args.device)
    facts = environment_facts(device.name(), world_size_from_env())
    facts["attention"] = choose_attention("auto", device)
    facts["backend"] = device.backend
    facts["triton_kernel"] = triton_kernel()
    sys.stdout.write(json.dumps(facts, indent=2) + "\n")
