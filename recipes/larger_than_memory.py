"""Run a checkpoint that is several times larger than memory, on the CPU, and measure speed and bytes read.

    python -m recipes.larger_than_memory                # 10 GB of random experts under 2.5 GiB; about five minutes
    python -m recipes.larger_than_memory --size 100MB --width 256 --limit 700MB --cache 20MB

Writes a checkpoint of random weights, then generates from it in a process with limited memory. The limit is a control
group, which also counts the system's file cache, if one can be created (Linux, as root), else the address space. The
bytes read per token are compared with those of a reader without a cache, and with the minimum for a cache of that size
that knows the router's choices in advance (Belady's rule).
"""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

import qwen3next as q
from qwen3next.checkpoints.progress import tracked
from qwen3next.checkpoints.save import write_config, write_shards
from qwen3next.checkpoints.state_dict_adapter import tensor_specs
from qwen3next.files.sizes import binary, parse_bytes

CGROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),  # version 1
    (Path("/sys/fs/cgroup"), "memory.max"),  # version 2
)


def config_of(size: int, width: int) -> q.ModelConfig:
    """128 experts per layer in the proportions of the released 80B model; as many layers as fit `size`, at least 4."""
    experts, inner = 128, width // 4
    layers = max(4, round(size / (experts * 3 * width * inner * 2)))
    return q.presets.qwen3_next_80b_a3b(
        vocab_size=4096,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        linear_num_key_heads=width // 128,
        linear_num_value_heads=width // 64,
        num_experts=experts,
        moe_intermediate_size=inner,
        shared_expert_intermediate_size=inner,
        mtp_num_hidden_layers=0,
        eos_token_id=None,
    )


def write_random(config: q.ModelConfig, folder: Path, *, seed: int) -> None:
    """Write a checkpoint of random bf16 weights, with one tensor in memory at a time."""
    generator = torch.Generator().manual_seed(seed)
    plan = [(entry, torch.bfloat16) for entry in tensor_specs(config)]

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("A_log"):
            return torch.rand(shape, generator=generator).mul(16).add(0.01).log().bfloat16()
        if name.endswith("linear_attn.norm.weight") or name.endswith("dt_bias"):
            return torch.ones(shape, dtype=torch.bfloat16)
        if "norm" in name:
            return torch.zeros(shape, dtype=torch.bfloat16)
        # Sampling uniform numbers is three times as fast as normal ones, and routing varies as much.
        return torch.rand(shape, generator=generator).sub_(0.5).mul_(0.02 * math.sqrt(12)).bfloat16()

    folder.mkdir(parents=True)
    tensors = ((entry.name, make(entry.name, entry.shape)) for entry, _ in plan)
    write_shards(folder, plan, tracked(tensors, sys.stderr.isatty(), "writing", len(plan)), 2 * 10**9)
    write_config(folder, config.to_dict(), torch.bfloat16)


def _write_pid(procs: str) -> None:
    Path(procs).write_text(str(os.getpid()))


@contextmanager
def limited(limit: int) -> Iterator[tuple[str, Any]]:
    """Yields the kind of memory limit, in words, and the function that a child process calls first to apply it."""
    for root, key in CGROUPS:
        group = root / f"qwen3next-{os.getpid()}"
        try:
            group.mkdir()
            (group / key).write_text(str(limit))
        except OSError:
            with suppress(OSError):
                group.rmdir()
            continue
        try:
            procs = str(group / "cgroup.procs")
            yield "control group, file cache counted", partial(_write_pid, procs)
        finally:
            for _ in range(100):  # the group cannot be removed while a process in it is still exiting
                with suppress(OSError):
                    group.rmdir()
                    break
                time.sleep(0.05)
        return
    yield "address space", partial(resource.setrlimit, resource.RLIMIT_AS, (limit, limit))


def least_misses(trace: list[tuple[int, int]], slots: int) -> int:
    """Reads of a cache that always evicts the expert needed furthest in the future, without prefetching."""
    following: list[float] = [math.inf] * len(trace)
    latest: dict[tuple[int, int], int] = {}
    for i in range(len(trace) - 1, -1, -1):
        following[i] = latest.get(trace[i], math.inf)
        latest[trace[i]] = i
    held: dict[tuple[int, int], float] = {}
    misses = 0
    for i, expert in enumerate(trace):
        if expert not in held:
            misses += 1
            if len(held) >= slots:
                furthest = max(held, key=held.__getitem__)
                if held[furthest] > following[i]:
                    del held[furthest]
                else:
                    continue  # needed later than all cached experts: not kept
        held[expert] = following[i]
    return misses


def measure(folder: Path, cache: str, prompt: int, new: int, seed: int) -> dict[str, Any]:
    """The limited process: load, prefill a prompt, generate, and measure all of it."""
    began = time.perf_counter()
    model = q.load(folder, experts="disk", expert_cache=cache)
    experts = model.expert_cache
    assert experts is not None
    loaded = time.perf_counter() - began
    ids = torch.randint(0, model.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(seed))
    state = model.new_cache(max_len=prompt + new)
    began = time.perf_counter()
    for _ in model.prefill(ids, state):
        pass
    prefill = time.perf_counter() - began
    prefill_bytes = experts.report.bytes_read
    held = [key for key in experts._kept]
    experts.reset()
    trace: list[tuple[int, int]] = []

    def note(indices: Tensor, hook: Any) -> None:
        layer = int(hook.name.split(".")[1])
        trace.extend((layer, e) for e in indices.flatten().tolist())

    began = time.perf_counter()
    with model.hooks([("blocks.*.mlp.hook_router_indices", note)]):
        q.generate(model, ids, cache=state, max_new_tokens=new + 1, stop_tokens=())
    seconds = time.perf_counter() - began
    report, c = experts.report, model.config
    one = 3 * c.hidden_size * c.moe_intermediate_size * 2
    warm = least_misses(held + trace, experts.slots) - len(held)
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return {
        "load_s": loaded,
        "prefill_tok_s": prompt / prefill,
        "prefill_bytes": prefill_bytes,
        "decode_tok_s": new / seconds,
        "hit_rate": report.hit_rate,
        "read_bytes_a_token": report.bytes_read / new,
        "routed_bytes_a_token": len(trace) * one / new,
        "least_bytes_a_token": max(warm, 0) * one / new,
        "read_bytes_a_second": report.bytes_read / seconds,
        "cache_bytes": experts.nbytes,
        "peak_resident_bytes": peak,
    }


def main(
    size: str = "10GB",
    limit: str = "2.5GiB",
    cache: str = "1.25GiB",
    prompt: int = 64,
    new: int = 64,
    seed: int = 0,
    width: int = 2048,
    folder: Path | None = None,
    out: Path | None = None,
    child: bool = False,
) -> None:
    """Measure generation from a checkpoint that does not fit into memory.

    Args:
        size: bytes of routed experts to write, in bf16.
        limit: memory limit of the process that generates.
        cache: part of that limit for the cache of experts.
        prompt: tokens of the prompt.
        new: tokens to generate.
        seed: random seed of weights and prompt.
        width: hidden size, a multiple of 256; the 80B model has 2048.
        folder: folder of an existing checkpoint, or for a new one; default a temporary one.
        out: JSON file for the figures.
        child: run as the limited process (internal use).
    """
    if child:
        assert folder is not None
        print(json.dumps(measure(folder, cache, prompt, new, seed)))
        return
    place = Path(tempfile.mkdtemp(prefix="larger-than-memory-")) if folder is None else folder
    model = place / "model" if folder is None else place
    try:
        if not (model / "config.json").exists():
            config = config_of(parse_bytes(size), width)
            print(
                f"writing {config.num_hidden_layers} layers of {config.num_experts} experts to {model}", file=sys.stderr
            )
            write_random(config, model, seed=seed)
        stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        with limited(parse_bytes(limit)) as (how, enter):
            print(f"generating under {limit} ({how})", file=sys.stderr)
            numbers = ["--prompt", str(prompt), "--new", str(new), "--seed", str(seed)]
            command = [sys.executable, "-m", "recipes.larger_than_memory", "--child", "--folder", str(model)]
            done = subprocess.run(
                [*command, "--cache", cache, *numbers], stdout=subprocess.PIPE, text=True, preexec_fn=enter
            )
        if done.returncode:
            raise SystemExit(f"The limited process ended with status {done.returncode}: is {limit} too little?")
        found = json.loads(done.stdout) | {"stored_bytes": stored, "limit_bytes": parse_bytes(limit), "limited_by": how}
        found |= {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "size_over_limit": stored / parse_bytes(limit),
        }
        if out is not None:
            out.write_text(json.dumps(found, indent=2) + "\n")
        for key, value in found.items():
            shown = binary(int(value)) if "bytes" in key else f"{value:.3g}" if isinstance(value, float) else value
            print(f"{key.removesuffix('_bytes').replace('_bytes_', '_').replace('_', ' '):24} {shown}")
    finally:
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    tyro.cli(main)
