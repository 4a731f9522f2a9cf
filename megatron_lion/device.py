"""The device, CUDA or CPU: its dtypes, memory and peak FLOP/s, and a CPU replacement for megatron-core's CUDA calls.

megatron-core 0.19.2 names CUDA in its source (`device="cuda"`, `torch.cuda.current_stream()`, …) and never checks
whether a device exists. If none exists, `install_cpu_stand_in` replaces these calls by their CPU equivalents, once and
only in this process. The same models, buckets, optimizer, schedules and checkpoints then run with gloo.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lion.errors import EnvironmentFault
from megatron_lion.jobs import place_from_env

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense fp16 peak (bf16 is the same, except on NO_BF16), FLOP/s, without sparsity, from the vendor's data sheets.
PEAK_FLOPS = {
    "V100": 125e12,
    "V100-PCIE": 112e12,
    "A10": 125e12,
    "A10G": 70e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100": 989e12,  # SXM
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,  # SXM
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "B200": 2250e12,
}
NO_BF16 = {"V100", "V100-PCIE"}

# Functions that megatron-core calls with device="cuda" or with torch.cuda.current_device().
_FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "empty_like",
    "zeros_like",
    "ones_like",
    "rand",
    "randn",
)

_installed = False


@dataclass(frozen=True)
class Device:
    """The device of tensors and the backend of collectives.

    Attributes:
        kind: "cuda" or "cpu".
        index: local CUDA device index; 0 on CPU.
        backend: torch.distributed backend, "nccl" or "gloo".
    """

    kind: str
    index: int
    backend: str

    @property
    def torch_device(self) -> torch.device:
        """The device as torch names it."""
        return torch.device("cuda", self.index) if self.kind == "cuda" else torch.device("cpu")

    @property
    def has_fused_kernels(self) -> bool:
        """Whether megatron-core's torch.compile'd fusions are used; on a CPU they would need a compiler and a warm-up."""
        return self.kind == "cuda"

    def memory_bytes(self) -> int | None:
        """Returns the bytes of the device's memory, or None on a CPU."""
        return int(torch.cuda.get_device_properties(self.index).total_memory) if self.kind == "cuda" else None

    def synchronize(self) -> None:
        """Waits for the device; timers need it, because CUDA launches return before the work is done."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.index)

    def max_memory_gib(self) -> float:
        """Returns this process's peak memory in GiB: allocated on the CUDA device, or the resident set on CPU."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.index) / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts it in KiB

    def name(self) -> str:
        """Returns the name of the CUDA device or of the processor."""
        if self.kind == "cuda":
            return torch.cuda.get_device_name(self.index)
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
        return "cpu"

    def peak_flops(self, precision: str) -> float | None:
        """Returns the device's dense peak in FLOP/s for `precision`, from the vendor's data sheet, or None if unknown."""
        return None if self.kind != "cuda" else peak_flops_of(self.name(), precision)


def peak_flops_of(name: str, precision: str) -> float | None:
    """Returns the dense matrix peak in FLOP/s of a device, or None if unknown.

    Args:
        name: as nvidia-smi prints it.
        precision: "bf16" or "fp16"; others have no peak in the table.

    Example:
        >>> peak_flops_of("NVIDIA H100 PCIe", "bf16"), peak_flops_of("NVIDIA A10", "bf16"), peak_flops_of("cpu", "bf16")
        (756000000000000.0, 125000000000000.0, None)
    """
    if precision not in ("bf16", "fp16") or "MIG" in name:  # a MIG instance has a share of the peak
        return None
    # Whole words only, so that A10 does not match A100 or A10G; the longest match, so that H100 PCIe is not an H100 SXM.
    matches = [key for key in PEAK_FLOPS if re.search(rf"\b{key}\b", name)]
    key = max(matches, key=len, default=None)
    return None if key is None or (key in NO_BF16 and precision == "bf16") else PEAK_FLOPS[key]


def select_device(wanted: str = "auto") -> Device:
    """Chooses the device of this process; on CPU, installs the replacement of CUDA calls.

    Args:
        wanted: "auto" (CUDA if a device is visible), "cuda" or "cpu".

    Raises:
        ConfigError: LOCAL_RANK or another variable of a launcher is wrong.
        EnvironmentFault: CUDA is requested and no device is visible, or a node has more processes than CUDA devices.
    """
    local_rank = place_from_env().local_rank
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise EnvironmentFault("--device cuda: no CUDA device is visible to torch; use --device cpu or auto")
    if wanted != "cpu" and available:
        if local_rank >= torch.cuda.device_count():
            raise EnvironmentFault(
                f"local rank {local_rank} has no CUDA device ({torch.cuda.device_count()} visible): "
                "start at most that many processes a node, or use --device cpu"
            )
        torch.cuda.set_device(local_rank)
        return Device("cuda", local_rank, "nccl")
    install_cpu_stand_in()
    return Device("cpu", 0, "gloo")


def quiet_known_warnings() -> None:
    """Silences the messages that megatron-core 0.19.2 prints for every correct use of it, and no others."""
    for message in (
        "Transformer Engine and Apex are not installed",
        "Apex is not installed",
        ".*Falling back to Torch (Norm|optimizers|LayerNorm)",
        ".*torch.distributed.* is deprecated",
        "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
        "full scope is deprecated",
        "The argument order of load has been changed",
        "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load",
        ".*numpy.core.multiarray is deprecated.*",
        ".*numpy.core is deprecated.*",
        ".*is deprecated, use torch.Tensor.*",
        ".*torch.distributed.distributed_c10d.*",
        ".*fp8 .*is not available.*",
        ".*TypedStorage is deprecated.*",
        ".*no current CUDA device.*",
        ".*_get_pg_default_device.*",
        ".*Please use DTensor instead.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in (
        "megatron.core.models.gpt.gpt_model",  # 'GPTModel IS DEPRECATED', although no successor trains GPT-2
        "megatron.core.models.bert.bert_model",
        "megatron.core.transformer.transformer_config",
        "megatron.core.dist_checkpointing.strategies.torch",
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "megatron.core.dist_checkpointing.strategies.state_dict_saver",
        "megatron.core.distributed.param_and_grad_buffer",
        "megatron.core.distributed.distributed_data_parallel",
        "megatron.core.datasets.blended_megatron_dataset_config",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


class _Stream:
    """A stream without pending work: a CPU operation is finished when its call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, stream: Any) -> None:
        del stream

    def wait_event(self, event: Any) -> None:
        del event

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        return None

    def query(self) -> bool:
        return True


class _Event:
    """A CUDA event's interface over the host's clock; times are in milliseconds."""

    def __init__(self, *_: Any, **__: Any) -> None:
        import time

        self._now = time.perf_counter
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        del stream
        self._time = self._now()

    def wait(self, stream: Any = None) -> None:
        del stream

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None

    def elapsed_time(self, end: _Event) -> float:
        return (end._time - self._time) * 1e3


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _stream_context(stream: Any) -> Iterator[Any]:
    yield stream


def install_cpu_stand_in() -> None:
    """Replaces CUDA calls by their CPU equivalents so that megatron-core runs without CUDA; a second call does nothing.

    mcore 0.19.2: device names are literal in its source; remove when it takes the device from its config.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        # --device cpu on a machine with GPUs: hide them before any code uses them.
        torch.cuda.is_available = lambda: False
    cpu = torch.device("cpu")
    # torch collects its factory functions at the first use of a device context: that must be before they are wrapped.
    with torch.device(cpu):
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.device_count = lambda: 0
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.Stream = cuda.streams.Stream = _Stream
    cuda.Event = cuda.streams.Event = _Event
    cuda.current_stream = cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = _stream_context
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = lambda seed: None  # torch.manual_seed calls it after seeding the CPU
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device="cpu": torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device="cpu": torch.set_rng_state(state)

    tensor: Any = torch.Tensor
    plain_type, plain_to = tensor.type, tensor.to

    def type_(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False) -> Any:
        if dtype is None:  # DistributedOptimizer compares the answer with 'torch.cuda.FloatTensor' and the like
            return plain_type(self).replace("torch.", "torch.cuda.", 1)
        return plain_type(self, dtype, non_blocking)

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(cpu if _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = cpu
        return plain_to(self, *args, **kwargs)

    tensor.type, tensor.to = type_, to
    tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]

    from megatron.core.tensor_parallel import random as megatron_random

    # On CPU the tracker's streams share the default generator: a fork swaps its state in and out.
    megatron_random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    _installed = True


quiet_known_warnings()  # at import of this module, because megatron-core warns while it is imported
