"""Compile every kernel of a decoding step for GPUs that are not here, and print what each needs, as JSON.

    python tests/kernels/compile_kernels.py 80 90 100

A program of its own: it must not run in Triton's interpreter. The kernels are those that one step of the official form
launches in bf16 and in fp32, found by running it on "meta" tensors. Triton's own ptxas assembles them; no driver is
needed. Each line: kernel, dtype, arch, registers a thread, bytes of spills, bytes of shared memory, warps.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from launches import official_launches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


def main() -> None:
    archs = [int(a) for a in sys.argv[1:]]
    for dtype in (torch.bfloat16, torch.float32):
        seen = set()
        for launch in official_launches(dtype):
            kernel, constants = launch.kernel, launch.constants
            source = _source(kernel, launch.arguments, constants)
            if (key := (kernel.__name__, str(sorted(constants.items())), str(source.signature))) in seen:
                continue
            seen.add(key)
            for arch in archs:
                found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": launch.warps})
                row = {"kernel": kernel.__name__, "dtype": str(dtype).removeprefix("torch."), "arch": arch}
                row |= _assembled(found.asm["ptx"], arch) | {"shared": found.metadata.shared, "warps": launch.warps}
                print(json.dumps(row), flush=True)


def _source(kernel, arguments: tuple, constants: dict) -> ASTSource:
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(arguments[i], torch.Tensor):
            signature[name] = NAMES[arguments[i].dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if arguments[i] < 2**31 else "i64"
            if arguments[i] % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attrs)


def _assembled(ptx: str, arch: int) -> dict[str, int]:
    """What ptxas reports. Raises: CalledProcessError where it refuses the kernel."""
    ptxas = PTXAS / ("ptxas-blackwell" if arch >= 100 and (PTXAS / "ptxas-blackwell").exists() else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx, encoding="utf-8")
        suffix = "a" if arch >= 90 else ""
        command = [str(ptxas), "-v", f"--gpu-name=sm_{arch}{suffix}", str(file), "-o", str(file.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    return {"registers": int(re.search(r"Used (\d+) registers", report)[1]), "spills": spills}


if __name__ == "__main__":
    main()
