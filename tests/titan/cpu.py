"""torchtitan on a CPU, for tests alone: importing this changes torch before torchtitan is imported.

torchtitan 0.3.0 takes a machine without an accelerator for a CUDA machine, and asks torch 2.13 for a few things that
only GPUs or later versions have.
"""

import importlib.util
import sys
import types

import torch
import torch.distributed as dist

torch._utils._get_available_device_type = lambda: "cpu"
if importlib.util.find_spec("triton") is None:  # torchtitan.trainer imports Triton kernels that it may not use

    def stand_in(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

    stub = types.ModuleType("torchtitan.distributed.minimal_async_ep")
    stub.__getattr__ = stand_in
    sys.modules[stub.__name__] = stub
for name, answer in {  # the memory monitor's questions
    "get_device_name": lambda _=None: "cpu",
    "get_device_properties": lambda _=None: types.SimpleNamespace(total_memory=1 << 30),
    "reset_peak_memory_stats": lambda _=None: None,
    "empty_cache": lambda: None,
    "memory_stats": lambda _=None: {},
}.items():
    if not hasattr(torch.cpu, name):
        setattr(torch.cpu, name, answer)
barrier = dist.barrier
dist.barrier = lambda *args, device_ids=None, **options: barrier(*args, **options)  # gloo takes no device_ids
if not hasattr(dist, "set_timeout"):
    dist.set_timeout = lambda *args, **options: None
