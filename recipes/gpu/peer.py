"""transformers' model on the same weights: routed experts are the same tensors, others are copies."""

import sys
from typing import Any

import torch

import qwen3next as q
from qwen3next.checkpoints.state_dict_adapter import Layout, to_released


def peer_of(model: q.Qwen3Next) -> Any:
    """transformers' Qwen3NextForCausalLM with the weights of `model`.

    Raises: ImportError where transformers is not installed; RuntimeError where its tensors have other names.
    """
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = transformers.Qwen3NextConfig(**_config_values(model))
    with torch.device("meta"):
        peer = transformers.Qwen3NextForCausalLM._from_config(config, dtype=model.dtype)
    weights = dict(model.named_parameters())
    tensors = dict(to_released(model.config, weights, Layout(fused_experts=True)))
    peer.load_state_dict({name: x.detach() for name, x in tensors.items()}, strict=True, assign=True)
    rotary = peer.model.rotary_emb
    peer.model.rotary_emb = type(rotary)(config=config).to(model.device)
    return peer.eval().requires_grad_(False)


def _config_values(model: q.Qwen3Next) -> dict[str, Any]:
    values = model.config.to_dict()
    return {k: v for k, v in values.items() if k not in ("architectures", "model_type")}


NAMES = ("chunk_gated_delta_rule", "recurrent_gated_delta_rule", "causal_conv1d_fn", "causal_conv1d_update")


def what_runs(peer: Any) -> str:
    """Which functions its layers call: flash-linear-attention's, or torch code in transformers."""
    parts = {}
    mixer = next((x.linear_attn for x in peer.model.layers if hasattr(x, "linear_attn")), None)
    if mixer is not None:
        parts = {name: name_of(_called(mixer, name)) for name in NAMES}
        parts["gated norm"] = f"{type(mixer.norm).__module__}.{type(mixer.norm).__qualname__}"
    parts["attention"] = str(getattr(peer.config, "_attn_implementation", "unknown"))
    parts["experts"] = str(getattr(peer.config, "_experts_implementation", "unknown"))
    return ", ".join(f"{name}: {value}" for name, value in parts.items())


def _called(mixer: Any, name: str) -> Any:
    """What a layer calls by this name: an attribute of the layer, or a function of its module."""
    scope = vars(sys.modules[type(mixer).__module__])
    found = (mixer.__dict__.get(name), scope.get(f"torch_{name}"), scope.get(name))
    return next((function for function in found if callable(function)), None)


def name_of(function: Any) -> str:
    """Module and name of a function, behind transformers' wrapper, which holds the one that it chose in a closure."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is not None and cells is not None and "implementation" in code.co_freevars:
        return name_of(cells[code.co_freevars.index("implementation")].cell_contents)
    return "not found" if function is None else f"{function.__module__}.{function.__qualname__}"
