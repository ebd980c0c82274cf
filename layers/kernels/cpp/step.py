"""What decode.cpp is told, as structures of ctypes, and its functions."""

import ctypes
from typing import Any

import torch

from layers.kernels.cpp.build import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.int8: 3}


class Mat(ctypes.Structure):
    _fields_ = [("p", ctypes.c_void_p), ("dtype", ctypes.c_int64)]


class Part(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("k", "v", "k_scale", "v_scale")),
        *((name, ctypes.c_int64) for name in ("n", "row", "head", "scale_row", "scale_head")),
    ]


def _fields(text: str) -> list[tuple[str, Any]]:
    """Of a C structure: `name` is a matrix, `*name` a pointer, `#name` a whole number."""
    kinds = {"*": ctypes.c_void_p, "#": ctypes.c_int64}
    return [(name.lstrip("*#"), kinds.get(name[0], Mat)) for name in text.split()]


class Layer(ctypes.Structure):
    _fields_ = _fields(
        "#softmax #sparse norm_in norm_post in_qkv in_z in_b in_a conv a_log dt_bias out_norm out "
        "*conv_before *conv_after *memory_before *memory_after #memory_dtype "
        "*tape_inputs *tape_k *tape_u *tape_decay "
        "q q_bias k k_bias v v_bias gate gate_bias o o_bias q_norm k_norm *parts #part_count #kv_dtype #gate_rows "
        "router experts_in experts_out shared_gate shared_up shared_down shared_weight"
    )


class Ends(ctypes.Structure):
    _fields_ = _fields("embedding norm head *ids *hidden *logits #vocab")


class Sizes(ctypes.Structure):
    _fields_ = [
        *_fields(
            "#layers #b #t #width #dtype #heads #kv_heads #head_dim #rotary #zero_centred "
            "#key_heads #value_heads #key_dim #value_dim #taps "
            "#experts #top_k #inner #shared_inner #dense_inner #renormalise"
        ),
        ("eps", ctypes.c_double),
    ]


def kernels() -> ctypes.CDLL:
    """The compiled code. Only where `build.missing()` is None. ctypes checks the number of arguments."""
    found = library()
    assert isinstance(found, ctypes.CDLL)
    return found
