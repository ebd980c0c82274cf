"""Writes folders in the formats of quantised checkpoints, with code that shares nothing with the reader.

Every weight is random codes, scales and zero points. What it is worth is computed one element at a time, or in numpy
from the codes, before they are packed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass
class Format:
    """How to write one weight: `write(rng, out, inputs)` gives the parts by name below the module, and its values."""

    write: Callable[[np.random.Generator, int, int], tuple[dict[str, Tensor], Tensor]]
    config: dict
    name: str
    fits: Callable[[int, int], bool] = field(default=lambda out, inputs: True)


def words(codes: np.ndarray, bits: int) -> Tensor:
    """int32 words along the last axis, lowest bits first; the last word is filled with zeros."""
    per = 32 // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)]).astype(np.uint64)
    total = sum(codes[..., k::per] << np.uint64(bits * k) for k in range(per))
    return torch.from_numpy(total.astype(np.uint32).view(np.int32).copy())


def scales(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scales for codes of size 8, so that weights have a standard deviation of about 0.06."""
    return torch.from_numpy(rng.uniform(0.005, 0.02, shape)).to(dtype)


def packed_ints(*, bits: int, group: int | None, symmetric: bool, dtype: torch.dtype = torch.bfloat16) -> Format:
    def write(rng, out, inputs):
        size = group or inputs
        codes, zeros = rng.integers(0, 2**bits, (out, inputs)), np.full((out, inputs // size), 2 ** (bits - 1))
        if not symmetric:
            zeros = rng.integers(0, 2**bits, zeros.shape)
        scale = scales(rng, *zeros.shape, dtype=dtype) * 2.0 ** (4 - bits)
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([out, inputs]),
        }
        if not symmetric:
            parts["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
        meant = (codes - zeros.repeat(size, 1)) * scale.double().numpy().repeat(size, 1)
        return parts, torch.from_numpy(meant).float()

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group}
    weights["strategy"] = "group" if group else "channel"
    return Format(
        write,
        compressed("pack-quantized", weights),
        "compressed-tensors pack-quantized",
        lambda _out, inputs: inputs % (group or 1) == 0,
    )


def compressed(kind: str, weights: dict) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["re:.*names_of_another_split.*"],
    }


def int8(*, asymmetric: bool = False) -> Format:
    def write(rng, out, inputs):
        codes, zeros = rng.integers(-128, 128, (out, inputs)), np.zeros((out, 1), dtype=int)
        scale = scales(rng, out, 1, dtype=torch.bfloat16) / 16
        parts = {"weight": torch.from_numpy(codes).to(torch.int8), "weight_scale": scale}
        if asymmetric:
            zeros = rng.integers(-128, 128, (out, 1))
            parts["weight_zero_point"] = torch.from_numpy(zeros).to(torch.int8)
        return parts, torch.from_numpy((codes - zeros) * scale.double().numpy()).float()

    weights = {"num_bits": 8, "type": "int", "symmetric": not asymmetric, "strategy": "channel"}
    return Format(write, compressed("int-quantized", weights), "FP8 or int8")


def float8(*, tensor: bool, modelopt: bool = False) -> Format:
    def write(rng, out, inputs):
        codes = torch.from_numpy(rng.normal(0, 100, (out, inputs))).clamp(-448, 448).to(torch.float8_e4m3fn)
        scale = scales(rng, *(() if tensor else (out, 1))) / 20
        parts = {"weight": codes, "weight_scale": scale}
        if modelopt:
            parts["input_scale"] = torch.tensor(0.3)
        return parts, (codes.double() * scale.double()).float()

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor" if tensor else "channel"}
    config = {"quant_method": "modelopt", "quant_algo": "FP8"} if modelopt else compressed("float-quantized", weights)
    return Format(write, config, "FP8 or int8")


def fp8_blocks(rows: int = 16, columns: int = 24) -> Format:
    """As the released FP8 checkpoints: blocks that are smaller at the edges."""

    def write(rng, out, inputs):
        codes = torch.from_numpy(rng.normal(0, 100, (out, inputs))).clamp(-448, 448).to(torch.float8_e4m3fn)
        scale = scales(rng, -(-out // rows), -(-inputs // columns)) / 20
        each = [[scale[i // rows, j // columns] for j in range(inputs)] for i in range(out)]
        return {"weight": codes, "weight_scale_inv": scale}, (codes.double() * torch.tensor(each).double()).float()

    return Format(write, {"quant_method": "fp8", "weight_block_size": [rows, columns]}, "FP8 or int8")


def fp4_values(rng: np.random.Generator, out: int, inputs: int) -> tuple[Tensor, np.ndarray]:
    codes = rng.integers(0, 16, (out, inputs)).astype(np.uint8)
    values = np.array([*E2M1, *(-x for x in E2M1)])[codes]
    return torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4), values


def nvfp4(*, modelopt: bool) -> Format:
    def write(rng, out, inputs):
        packed, values = fp4_values(rng, out, inputs)
        scale = torch.from_numpy(rng.uniform(16, 448, (out, inputs // 16))).to(torch.float8_e4m3fn)
        whole = torch.tensor(7e-5 if modelopt else 14_000.0)
        tensors = {"weight_scale": scale} | ({"input_scale": torch.tensor(0.2)} if modelopt else {})
        tensors |= {"weight_scale_2": whole} if modelopt else {"weight_global_scale": whole[None]}
        tensors["weight" if modelopt else "weight_packed"] = packed
        each = scale.float().numpy() * whole.numpy() if modelopt else scale.float().numpy() / whole.numpy()
        return tensors, torch.from_numpy(values.astype(np.float32) * each.repeat(16, 1))

    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    config = compressed("nvfp4-pack-quantized", weights)
    name = "modelopt NVFP4" if modelopt else "compressed-tensors nvfp4-pack-quantized"
    if modelopt:
        config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    return Format(write, config, name, lambda _out, inputs: inputs % 16 == 0)


def mxfp4() -> Format:
    def write(rng, out, inputs):
        packed, values = fp4_values(rng, out, inputs)
        exponent = rng.integers(118, 124, (out, inputs // 32)).astype(np.uint8)
        meant = values * 2.0 ** (exponent.astype(int) - 127).repeat(32, 1)
        parts = {"weight_packed": packed, "weight_scale": torch.from_numpy(exponent)}
        return parts, torch.from_numpy(meant).float()

    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    return Format(
        write,
        compressed("mxfp4-pack-quantized", weights),
        "compressed-tensors mxfp4-pack-quantized",
        lambda _out, inputs: inputs % 32 == 0,
    )


def gptq(*, bits: int = 4, group: int = 64, version: int = 1, ordered: bool = False, g_idx: bool = True) -> Format:
    """`group` need not divide the inputs: the last group is then shorter. Zero points are at least 1, as v1 needs."""

    def write(rng, out, inputs):
        of = np.arange(inputs) // group
        of = rng.permutation(of) if ordered else of
        codes, zeros = rng.integers(0, 2**bits, (out, inputs)), rng.integers(1, 2**bits, (out, of.max() + 1))
        scale = scales(rng, *zeros.shape, dtype=torch.float16) * 2.0 ** (4 - bits)
        parts = {
            "qweight": words(codes, bits).T.contiguous(),
            "qzeros": words((zeros - 1 if version == 1 else zeros).T, bits),
            "scales": scale.T.contiguous(),
        }
        if g_idx:
            parts["g_idx"] = torch.from_numpy(of.astype(np.int32))
        return parts, torch.from_numpy((codes - zeros[:, of]) * scale.double().numpy()[:, of]).float()

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": ordered, "sym": False}
    config["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    config["dynamic"] = {"-:.*names_of_another_split.*": {}}
    return Format(write, config, "GPTQ", lambda out, inputs: out % (32 // bits) == 0 and inputs % (32 // bits) == 0)


def autoround(packing: str) -> Format:
    version = 1 if packing == "auto_round:auto_gptq" else 2
    written = gptq(group=32, version=version, g_idx=False)
    written.config = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 32,
        "packing_format": packing,
        "sym": False,
    }
    return written


def awq(*, group: int = 32, autoround: bool = False) -> Format:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def gemm(codes: np.ndarray) -> Tensor:
        return words(codes.reshape(len(codes), -1, 8)[..., order].reshape(codes.shape), 4)

    def write(rng, out, inputs):
        codes, zeros = rng.integers(0, 16, (inputs, out)), rng.integers(0, 16, (inputs // group, out))
        scale = scales(rng, *zeros.shape, dtype=torch.float16)
        meant = (codes - zeros.repeat(group, 0)) * scale.double().numpy().repeat(group, 0)
        parts = {"qweight": gemm(codes), "qzeros": gemm(zeros), "scales": scale}
        return parts, torch.from_numpy(meant.T.copy()).float()

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    if autoround:
        config = {"quant_method": "auto-round", "bits": 4, "group_size": group, "packing_format": "auto_round:auto_awq"}
    return Format(write, config, "AWQ gemm", lambda out, inputs: out % 8 == 0 and inputs % group == 0)


FORMATS = {
    "fp8 blocks": fp8_blocks(),
    "int4": packed_ints(bits=4, group=32, symmetric=True),
    "int4 channel": packed_ints(bits=4, group=None, symmetric=True),
    "int4 asymmetric": packed_ints(bits=4, group=16, symmetric=False),
    "int4 channel asymmetric": packed_ints(bits=4, group=None, symmetric=False, dtype=torch.float16),
    "int8": packed_ints(bits=8, group=32, symmetric=True, dtype=torch.float32),
    "int8 channel asymmetric": packed_ints(bits=8, group=None, symmetric=False),
    "int2": packed_ints(bits=2, group=8, symmetric=True),
    "w8a8": int8(),
    "w8a8 asymmetric": int8(asymmetric=True),
    "float8": float8(tensor=False),
    "float8 tensor": float8(tensor=True),
    "modelopt float8": float8(tensor=True, modelopt=True),
    "nvfp4": nvfp4(modelopt=False),
    "modelopt nvfp4": nvfp4(modelopt=True),
    "mxfp4": mxfp4(),
    "gptq": gptq(),
    "gptq v2": gptq(version=2, group=32),
    "gptq 8 bits": gptq(bits=8, group=24),
    "gptq 2 bits": gptq(bits=2, group=40),
    "gptq ordered": gptq(ordered=True, group=40),
    "gptq without g_idx": gptq(g_idx=False),
    "gptq one group": gptq(g_idx=False, group=10_000),
    "autoround": autoround("auto_round"),
    "autoround gptq": autoround("auto_round:auto_gptq"),
    "autoround awq": awq(autoround=True),
    "awq": awq(),
}


def write_folder(folder, form: Format, seed: int = 0) -> dict[str, Tensor]:
    """Quantise a folder of plain weights in place; returns what each quantised weight is worth, in fp32.

    As the formats' own tools do, leaves alone the head, embedding, router, gates, norms and what does not fit.
    """
    rng, meant = np.random.default_rng(seed), {}
    tensors = load_file(folder / "model.safetensors")
    for name, x in list(tensors.items()):
        tensors[name] = x if "norm" in name or "A_log" in name else x.bfloat16()
        if x.ndim != 2 or not name.endswith(("_proj.weight", "qkvz.weight", "qkv.weight")) or not form.fits(*x.shape):
            continue
        del tensors[name]
        parts, meant[name] = form.write(rng, *x.shape)
        tensors |= {f"{name.removesuffix('weight')}{end}": part for end, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": form.config, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return meant
