"""The device module: peak FLOP/s by a device's name."""

from __future__ import annotations

import pytest

from megatron_lion.device import Device, peak_flops_of

# Names as nvidia-smi and torch.cuda.get_device_name print them, with the dense bf16 and fp16 peaks in TFLOP/s.
PEAKS = {
    "NVIDIA H100 80GB HBM3": (989, 989),
    "NVIDIA H100 PCIe": (756, 756),
    "NVIDIA H100 NVL": (835, 835),
    "NVIDIA H200": (989, 989),
    "NVIDIA H200 NVL": (835, 835),
    "NVIDIA GH200 480GB": (989, 989),
    "NVIDIA B200": (2250, 2250),
    "NVIDIA A100-SXM4-80GB": (312, 312),
    "NVIDIA A100-SXM4-40GB": (312, 312),
    "NVIDIA A100-PCIE-40GB": (312, 312),
    "NVIDIA A100 80GB PCIe": (312, 312),
    "NVIDIA A10": (125, 125),
    "NVIDIA A10G": (70, 70),
    "NVIDIA L4": (121, 121),
    "NVIDIA L40S": (362, 362),
    "Tesla V100-SXM2-32GB": (None, 125),
    "Tesla V100-PCIE-16GB": (None, 112),
    "NVIDIA L40": (None, None),
    "NVIDIA H20": (None, None),
    "NVIDIA H800": (None, None),
    "NVIDIA B300 SXM6 AC": (None, None),
    "NVIDIA A100-SXM4-80GB MIG 1g.10gb": (None, None),
    "NVIDIA GeForce RTX 4090": (None, None),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peaks_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for precision, peak in zip(("bf16", "fp16"), PEAKS[name], strict=True):
        assert peak_flops_of(name, precision) == (None if peak is None else peak * 1e12)
    assert peak_flops_of(name, "fp32") is None
    monkeypatch.setattr(Device, "name", lambda device: name)
    assert Device("cuda", 0, "nccl").peak_flops("fp16") == peak_flops_of(name, "fp16")
    assert Device("cpu", 0, "gloo").peak_flops("fp16") is None
