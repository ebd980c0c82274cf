"""The arguments of decode.cpp as ctypes structures: field by field those of decode_arguments.h.

All have `__slots__`: without them, ctypes accepts a field that does not exist and leaves the real one zero.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from layers.cpp.build import library
from layers.cpp.operands import address

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2, torch.int8: 3}
CODES = {torch.int8: 3, torch.uint8: 4}  # of weights in groups
SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 5}


class Mat(ctypes.Structure):
    """A contiguous weight; null where the model has none."""

    __slots__ = ()
    _fields_ = [
        ("p", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("scale_dtype", ctypes.c_int64),
        ("group", ctypes.c_int64),
    ]


def _fields(text: str, **structures: type[ctypes.Structure]) -> list[tuple[str, Any]]:
    """Of a C structure: `name` is a matrix, `*name` a pointer, `#name` a whole number; then structures inside it."""
    kinds = {"*": ctypes.c_void_p, "#": ctypes.c_int64}
    return [*((name.lstrip("*#"), kinds.get(name[0], Mat)) for name in text.split()), *structures.items()]


class Part(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields("*k *v *k_scale *v_scale #n #row #head #scale_row #scale_head")


class DeltaNet(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields("in_qkv in_z in_b in_a conv a_log dt_bias out_norm out")


class Attention(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields("q q_bias k k_bias v v_bias gate gate_bias o o_bias q_norm k_norm #gate_rows")


class FeedForward(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields("router experts_in experts_out shared_gate shared_up shared_down shared_weight")


class RecurrentState(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields("*conv_before *conv_after *before *after #dtype *log_inputs *log_keys *log_deltas *log_decay")


class KeysAndValues(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields("*parts #count #dtype")


class Layer(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields(
        "#softmax #sparse norm_in norm_post", delta_net=DeltaNet, attention=Attention, feed_forward=FeedForward
    )
    _fields_ += _fields("*recurrent *kv")


class EmbeddingAndHead(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields("embedding norm head norm_embedding norm_hidden fc fc_bias #vocab")


class Row(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields("#cache #index #first #count #past")


class Call(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields("*rows #row_count *ids *cos *sin *wanted #wanted_count *hidden *logits")


class Sizes(ctypes.Structure):
    __slots__ = ()
    _fields_ = [
        *_fields(
            "#layers #width #dtype #heads #kv_heads #head_dim #rotary #zero_centred "
            "#key_heads #value_heads #key_dim #value_dim #kernel_size "
            "#experts #top_k #inner #shared_intermediate_size #dense_inner #norm_topk_prob"
        ),
        ("eps", ctypes.c_double),
    ]


# In the order of `structure_size` in decode.cpp.
STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    Mat, Part, DeltaNet, Attention, FeedForward, RecurrentState, KeysAndValues, Layer, EmbeddingAndHead, Row, Call,
    Sizes,
)  # fmt: skip


def mat(x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Mat:
    """A weight (…, rows, columns), or with `scale` the codes of one in groups. The tensors must stay alive.

    Raises: ValueError for one without memory for all of its numbers.
    """
    if scale is None:
        return Mat(address(x), DTYPES[x.dtype])
    columns, rows = x.shape[-1] * (2 if x.dtype == torch.uint8 else 1), x.numel() // max(x.shape[-1], 1)
    group = columns * rows // max(scale.numel(), 1)
    points = None if zero is None else address(zero)
    return Mat(address(x), CODES[x.dtype], address(scale), points, SCALES[scale.dtype], group)


def has_field(path: str) -> bool:
    """Whether `Layer` or `EmbeddingAndHead` has a matrix at such a path, as "attention.q"."""
    *outer, name = path.split(".")
    structures: list[Any] = [Layer, EmbeddingAndHead]
    for part in outer:
        structures = [found for s in structures if (found := dict(s._fields_).get(part)) is not None]
    return any(dict(s._fields_).get(name) is Mat for s in structures)


def set_field(structure: ctypes.Structure, path: str, value: object) -> None:
    """Set what lies at such a path."""
    *outer, name = path.split(".")
    for part in outer:
        structure = getattr(structure, part)
    setattr(structure, name, value)


def kernels() -> ctypes.CDLL:
    """The compiled code. Only where `build.missing()` is None. ctypes checks the number of arguments."""
    found = library()
    assert isinstance(found, ctypes.CDLL)
    _check_sizes(found)
    return found


@cache
def _check_sizes(found: ctypes.CDLL) -> None:
    for i, structure in enumerate(STRUCTURES):
        assert ctypes.sizeof(structure) == found.structure_size(i), structure.__name__
