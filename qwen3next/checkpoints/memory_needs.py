"""How much memory the weights of a checkpoint need, and whether there is as much, before anything is allocated."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from layers.quantised.held import GroupLayout
from qwen3next.checkpoints.expert_weights import routed
from qwen3next.files.sizes import binary

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def bytes_needed(
    model: nn.Module, dtype_of: Callable[[str], torch.dtype], layouts: Mapping[str, GroupLayout] | None = None
) -> dict[str, int]:
    """Bytes of weights where a model is loaded, for each `experts=` of `q.load`; a cache of experts is not counted.

    Args:
        model: it may be on the meta device; its routed experts are still its own.
        dtype_of: the dtype that a parameter, by name, is kept in.
        layouts: of parameters that stay in groups; a tied head among them is a copy.
    """
    others = experts = int8 = 0
    counted: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if layouts and name in layouts:
            size = layouts[name].nbytes(*parameter.shape)
        elif id(parameter) in counted:
            continue
        else:
            counted.add(id(parameter))
            size = parameter.numel() * dtype_of(name).itemsize
        if routed(name):
            experts += size
            int8 += parameter.numel() + 4 * (parameter.numel() // parameter.shape[-1])  # with an fp32 scale a row
        else:
            others += size
    return {"memory": others + experts, "int8": others + int8, "disk": others}


def check_memory(needs: dict[str, int], experts: str, device: torch.device, name: str) -> None:
    """Refuse to load what does not fit.

    Args:
        needs: as `bytes_needed` returns.
        experts: the place asked for.
        name: of the checkpoint.
    Raises: ValueError that says how much is needed, how much is free, and what would fit.
    """
    free = free_bytes(device)
    if free is None or needs[experts] <= free:
        return
    less = {place: n for place, n in needs.items() if n < needs[experts]}
    fits = " or ".join(f'experts="{place}" ({binary(n)})' for place, n in less.items() if n <= free)
    remedy = f"choose {fits}" if fits else "free some, or use a smaller dtype or another device"
    raise ValueError(
        f"{name} needs {binary(needs[experts])} for its weights and {device} has {binary(free)} free: {remedy}."
    )


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch's allocator
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or not MEMINFO.exists():
        return None
    kilobytes = dict(line.split(":") for line in MEMINFO.read_text(encoding="ascii").splitlines())
    free = 1024 * sum(int(kilobytes[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    try:  # a container's own limit; files that it has read count as used, and are given back when memory is needed
        most = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        held = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # no such limit
        return free
    return min(free, most - held + int(stat["inactive_file"]) + int(stat["active_file"]))
