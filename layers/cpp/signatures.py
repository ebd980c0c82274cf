"""The arguments of every compiled function, by which ctypes checks and converts each call.

A letter an argument: p an address (a tensor's, an array's, a structure's), i a whole number (int64), f a float. What a
function gives back is a whole number (int64); those of which nothing is asked give nothing.
"""

import ctypes

_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_TWO = ("fp32", "bf16")
_WIDENING = (*_TWO, "bf16_fp32")  # the last: from bf16 rows to fp32 ones

ARGUMENTS: dict[str, str] = {
    **{f"delta_rule_{name}": "p" * 11 for name in _TWO},
    **{f"delta_rule_backward_{name}": "p" * 16 for name in _TWO},
    **{f"attend_{name}": "p" * 6 for name in _TWO},
    **{f"normalise_{name}": "ppppiiiiffii" for name in _WIDENING},
    **{f"normalise_backward_{name}": "pppppppiiiiff" for name in _WIDENING},
    **{f"convolve_{name}": "ppppiiii" for name in _TWO},
    **{f"convolve_backward_{name}": "pppppppiiii" for name in _TWO},
    **{f"silu_{name}": "ppi" for name in _TWO},
    **{f"swiglu_{name}": "pppiiii" for name in _TWO},
    **{f"swiglu_backward_{name}": "pppppiiii" for name in _TWO},
    **{f"combine_{name}": "ppppiii" for name in _WIDENING},
    **{f"combine_backward_{name}": "ppppppiii" for name in _WIDENING},
    **{f"products_{name}": "ppppiiii" for name in _TWO},
    **{f"products_to_x_{name}": "ppppiiii" for name in _TWO},
    **{f"products_to_weight_{name}": "ppppiiii" for name in _WIDENING},
    **{f"feed_forward_{name}": "ppppppiiii" for name in _TWO},
    "each_once": "pii",
    "permute": "ppppiii",
    "decode_step": "ppppi",
    "linear": "piiippii",
    "dequantise": "piipi",
    "replay": "pippppi",
    "fold": "ppiiipi",
    "remember_pairs": "pppppi",
    "draft": "pppppipi",
    "structure_size": "i",
}
ANSWERS = {"each_once", "permute", "structure_size"}


def declare(kernels: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes what the functions of a loaded library take and give."""
    for name, letters in ARGUMENTS.items():
        function = getattr(kernels, name)
        function.argtypes = [_KINDS[letter] for letter in letters]
        function.restype = ctypes.c_int64 if name in ANSWERS else None
    return kernels
