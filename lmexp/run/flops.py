"""Peak arithmetic rates of devices: the denominator of model-flops utilisation (MFU)."""

from __future__ import annotations

import re
import time

import torch

PEAK_TFLOPS_BF16 = {
    # dense, without sparsity, from the vendors' data sheets; the first that is a word of the device's name counts
    "H200": 989.5,
    "GH200": 989.5,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.5,
    "B200": 2250.0,
    "A100": 312.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Device name -> TFLOP/s of bf16 (V100, T4: fp16) matrix products."""


def peak_flops(device: torch.device, bf16: bool) -> float | None:
    """Peak FLOP/s of a device in the precision used; None where nothing is known (then no MFU is logged).

    A CUDA device's comes from the table, in float32 as half the TF32 rate would mislead, so only bf16 is known.
    A CPU's is measured by a float32 matrix product, about a twentieth of a second.
    """
    if device.type == "cuda" and bf16:
        name = torch.cuda.get_device_name(device)
        return next((rate * 1e12 for known, rate in PEAK_TFLOPS_BF16.items() if re.search(rf"\b{known}\b", name)), None)
    if device.type == "cpu" and not bf16:
        return _measured_cpu_peak()
    return None


def _measured_cpu_peak(size: int = 768) -> float:
    a, b = torch.ones(size, size), torch.ones(size, size)
    out = torch.empty(size, size)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
