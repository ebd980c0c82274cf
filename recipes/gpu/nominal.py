"""Rates from vendors' data sheets: dense bf16 matrix products, without sparsity."""

from typing import NamedTuple

import torch


class Nominal(NamedTuple):
    """A device's bf16 operations per second by its data sheet."""

    name: str
    flops: float


# By a part of the device's name. SXM parts; PCIe and NVL parts have less, and are left out by `EXCEPT`.
SHEETS = (
    Nominal("A100", 312e12),
    Nominal("H100", 989e12),
    Nominal("H200", 989e12),
    Nominal("B200", 2250e12),
)
EXCEPT = ("PCIe", "NVL", "MIG", "GB200")


def nominal_flops(device: torch.device) -> Nominal | None:
    """The entry of this device, None where there is none."""
    return nominal_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def nominal_by_name(name: str) -> Nominal | None:
    if any(word in name for word in EXCEPT):
        return None
    return next((sheet for sheet in SHEETS if sheet.name in name), None)
