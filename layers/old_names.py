"""Modules of this package by the names that they had before they moved into subpackages; kept for one release."""

from layers.deprecation import MovedModules

MODULES = {
    "layers.attached": "layers.dispatch.attached",
    "layers.attention_variants": "layers.variants.attention",
    "layers.backends": "layers.dispatch.backends",
    "layers.deltanet_variants": "layers.variants.deltanet",
    "layers.expert_cache": "layers.experts.cache",
    "layers.exposed_delta_rule": "layers.interp.materialized_states",
    "layers.fused_attention": "layers.kernels.flash_attention",
    "layers.grouped_linear": "layers.kernels.grouped_linear",
    "layers.implicit_attention": "layers.interp.implicit_attention",
    "layers.int8_experts": "layers.experts.int8",
    "layers.kv_state": "layers.state.kv_cache",
    "layers.linear_rule": "layers.variants.simple_gla",
    "layers.native": "layers.cpp",
    "layers.native.build": "layers.cpp.build",
    "layers.native.cpu": "layers.cpp.cpu",
    "layers.native.functions": "layers.cpp.functions",
    "layers.native.operands": "layers.cpp.operands",
    "layers.native.ops": "layers.cpp.ops",
    "layers.native.signatures": "layers.cpp.signatures",
    "layers.native.step": "layers.cpp.step",
    "layers.offloaded_experts": "layers.experts.disk",
    "layers.piecewise_delta_rule": "layers.kernels.chunked_recompute",
    "layers.replay": "layers.state.update_log",
    "layers.self_check": "layers.dispatch.self_check",
    "layers.static_kv": "layers.state.static_kv_cache",
    "layers.tiled_attention": "layers.kernels.tiled_attention",
    "layers.wild": "layers.kernels.isolation",
}
NAMES = {
    "KVState": "KVCache",
    "StaticKV": "StaticKVCache",
    "Tape": "UpdateLog",
    "gated_linear_rule": "simple_gla",
    "exposed_delta_rule": "materialized_delta_rule",
    "Exposed": "Materialized",
}


def install() -> None:
    """Find these modules and names, with a warning."""
    MovedModules(MODULES, NAMES).install()
