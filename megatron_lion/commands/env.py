"""`megatron-lion env`: versions, missing packages and hardware as JSON, for bug reports."""

from __future__ import annotations

import json
import sys
from typing import Any

HELP = "Print versions, missing packages, hardware and available kernels as JSON, for bug reports"


def add_arguments(parser: Any) -> None:
    """Declares the verb's flags."""
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")


def run(args: Any) -> None:
    """Prints the facts to stdout."""
    from megatron_lion.device import select_device
    from megatron_lion.installation import unsuitable
    from megatron_lion.jobs import world_size_from_env
    from megatron_lion.model.kernel_choice import loss_on_this_machine
    from megatron_lion.model.mcore_settings import choose_attention
    from megatron_lion.model.weight_gradients import weight_gradients
    from megatron_lion.optim.triton_check import triton_kernel
    from megatron_lion.runs.folder import environment_facts

    device = select_device(args.device)
    facts = environment_facts(device.name(), world_size_from_env())
    facts["attention"] = choose_attention("auto", device)
    facts["loss"] = loss_on_this_machine(device)
    facts["backend"] = device.backend
    facts["triton_kernel"] = triton_kernel()
    facts["weight_gradients"] = weight_gradients(device)
    _write({**facts, "interpreter": sys.executable, "missing": [], "unsuitable": unsuitable()})


def print_without_packages() -> None:
    """Prints the facts that need no packages, the missing packages, and the command that installs them.

    __main__.py calls it in the place of `run` if a required package is missing: without jsonargparse there is no parser.
    """
    from megatron_lion.installation import install_command, missing, unsuitable
    from megatron_lion.runs.environment import host_facts

    names = missing()
    unknown = dict.fromkeys(
        ("device", "world_size", "attention", "loss", "backend", "triton_kernel", "weight_gradients")
    )
    _write({**host_facts(), **unknown, "interpreter": sys.executable, "missing": names,
            "unsuitable": unsuitable(), "install": install_command(names)})  # fmt: skip


def _write(facts: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(facts, indent=2) + "\n")
