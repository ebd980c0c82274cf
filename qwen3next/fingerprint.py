"""What a file that belongs to a model names it by."""

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import asdict, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from qwen3next.model import Qwen3Next

NUMBERS = 64  # of each parameter


def fingerprint(
    model: "Qwen3Next",
    *,
    left_out: Callable[[str], bool],
    beside: Collection[str] = ("extra", "outer"),
    any_dtype: bool = False,
) -> str:
    """sha256 of the configuration, and of name, dtype, shape and a few numbers of every parameter.

    Args:
        left_out: parameters that do not matter to the file, by name.
        beside: fields of the configuration that do not.
        any_dtype: a model is the same in fp32 and in bf16; numbers are rounded to bf16 then.
    """
    config = {f.name: getattr(model.config, f.name) for f in fields(model.config) if f.name not in beside}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=_plain).encode())
    for name, parameter in model.named_parameters():
        if not left_out(name):
            flat = parameter.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // NUMBERS)][:NUMBERS].cpu().contiguous()
            some = some.bfloat16() if any_dtype else some
            digest.update(f"{name} {some.dtype} {tuple(parameter.shape)}".encode())
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else list(value)
