"""Compile every Triton kernel of ours for GPUs that are not here, and print what each needs, as JSON.

    python tests/kernels/compile_kernels.py 80 90 100

A program of its own: it must not run in Triton's interpreter. The kernels are those of decoding steps and of rows,
found by running them on "meta" tensors: of the official form in bf16 and fp32, and for the first GPU of small models of
other forms.
Triton's own ptxas assembles them; no driver is needed. Each line: form, kernel, dtype, arch, registers a thread, bytes
of spills, bytes of shared memory, warps.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from conftest import small_config
from launches import BOTH, Launch, official, rows_on_meta, step_on_meta
from test_decode import SHAPES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


def main() -> None:
    archs, seen = [int(a) for a in sys.argv[1:]], set()
    for form, launch in _launches():
        kernel, constants = launch.kernel, launch.constants
        source = _source(kernel, launch.arguments, constants)
        if (key := (kernel.__name__, str(sorted(constants.items())), str(source.signature))) in seen:
            continue
        seen.add(key)
        for arch in archs if form == "official" else archs[:1]:
            found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": launch.warps})
            dtype = NAMES[launch.arguments[0].dtype].removeprefix("*")
            row = {"form": form, "kernel": kernel.__name__, "dtype": dtype, "arch": arch}
            row |= _assembled(found.asm["ptx"], arch) | {"shared": found.metadata.shared, "warps": launch.warps}
            print(json.dumps(row), flush=True)


def _launches() -> Iterator[tuple[str, Launch]]:
    """The form and each launch of its step."""
    for dtype in (torch.bfloat16, torch.float32):
        for launch in (*step_on_meta(official(*BOTH), dtype)[0], *rows_on_meta(dtype)):
            yield "official", launch
    for name, changes in SHAPES.items():
        for launch in step_on_meta(small_config(**changes), torch.bfloat16, 2)[0]:
            yield name, launch
    for launch in step_on_meta(small_config(), torch.bfloat16, 2, kv_dtype=torch.float32)[0]:
        yield "keys in fp32", launch


def _source(kernel, arguments: tuple, constants: dict) -> ASTSource:
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(arguments[i], torch.Tensor):
            signature[name] = NAMES[arguments[i].dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(arguments[i], float):
            signature[name] = "fp32"
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
