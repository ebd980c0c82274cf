"""The C++ kernels as functions of tensors, without gradients (functions.py has these), and as operators of torch.

Each checks its arguments: tensors of the dtypes and shapes that its docstring names, on the CPU, or a ValueError.
Where a kernel wants contiguous numbers, it gets a contiguous copy.
"""

from layers.cpp.attention_ops import attend
from layers.cpp.conv_ops import convolve, convolve_backward
from layers.cpp.expert_ops import (
    combine,
    combine_backward,
    feed_forward,
    feed_forward_in_groups,
    permute,
    products,
    products_backward,
)
from layers.cpp.row_ops import normalise, normalise_backward, silu_fp32, swiglu, swiglu_backward
from layers.cpp.rule_ops import delta_rule, delta_rule_backward

__all__ = [
    "attend",
    "combine",
    "combine_backward",
    "convolve",
    "convolve_backward",
    "delta_rule",
    "delta_rule_backward",
    "feed_forward",
    "feed_forward_in_groups",
    "normalise",
    "normalise_backward",
    "permute",
    "products",
    "products_backward",
    "silu_fp32",
    "swiglu",
    "swiglu_backward",
]
