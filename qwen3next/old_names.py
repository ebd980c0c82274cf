"""Modules of this package by the names that they had before they moved into subpackages; kept for one release."""

from layers.deprecation import MovedModules

MODULES = {
    "qwen3next.atomic": "qwen3next.files.atomic",
    "qwen3next.cache_files": "qwen3next.cache.files",
    "qwen3next.chat_template": "qwen3next.chat.template",
    "qwen3next.checkpoint": "qwen3next.api",
    "qwen3next.convert": "qwen3next.checkpoints.convert",
    "qwen3next.decode": "qwen3next.decoding.plan",
    "qwen3next.diff": "qwen3next.checkpoints.diff",
    "qwen3next.document": "qwen3next.chat.document",
    "qwen3next.expert_weights": "qwen3next.checkpoints.expert_weights",
    "qwen3next.expose": "qwen3next.hooks.materialize",
    "qwen3next.fingerprint": "qwen3next.files.fingerprint",
    "qwen3next.generate": "qwen3next.generation.generate",
    "qwen3next.generation_config": "qwen3next.generation.generation_config",
    "qwen3next.graph_decode": "qwen3next.decoding.cuda_graph",
    "qwen3next.guard": "qwen3next.decoding.guard",
    "qwen3next.hook_names": "qwen3next.hooks.names",
    "qwen3next.json_files": "qwen3next.files.json_files",
    "qwen3next.messages": "qwen3next.chat.messages",
    "qwen3next.opened": "qwen3next.checkpoints.reader",
    "qwen3next.prefill": "qwen3next.generation.prefill",
    "qwen3next.prefix_files": "qwen3next.prefix.files",
    "qwen3next.prefix_store": "qwen3next.prefix.store",
    "qwen3next.prefix_tree": "qwen3next.prefix.tree",
    "qwen3next.recording": "qwen3next.hooks.recording",
    "qwen3next.released": "qwen3next.checkpoints.state_dict_adapter",
    "qwen3next.reply": "qwen3next.chat.reply",
    "qwen3next.rollback": "qwen3next.cache.rollback_log",
    "qwen3next.sampling_rules": "qwen3next.generation.sampling_rules",
    "qwen3next.sealed": "qwen3next.files.checksummed",
    "qwen3next.sizes": "qwen3next.files.sizes",
    "qwen3next.template_sandbox": "qwen3next.chat.sandbox",
    "qwen3next.tensor_files": "qwen3next.files.tensor_files",
    "qwen3next.text": "qwen3next.generation.text",
    "qwen3next.thinking": "qwen3next.chat.thinking",
    "qwen3next.variant_tensors": "qwen3next.checkpoints.variant_tensors",
    "qwen3next.verify": "qwen3next.checkpoints.verify",
    "qwen3next.wrappers": "qwen3next.hooks.wrappers",
}
NAMES = {
    "Journal": "RollbackLog",
    "Opened": "CheckpointReader",
    "Entry": "TensorSpec",
    "Place": "ParamSlice",
    "entries": "tensor_specs",
    "expose": "materialize",
}


def install() -> None:
    """Find these modules and names, with a warning."""
    MovedModules(MODULES, NAMES).install()
