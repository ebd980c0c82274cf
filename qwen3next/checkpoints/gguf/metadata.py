"""The metadata of a GGUF file from a model's configuration and tokenizer; the reverse of config.py and tokenizer.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3next.checkpoints.gguf.config import EXPERTS, MODEL_TYPES, SIZES
from qwen3next.checkpoints.gguf.tokenizer import CONTROL, SPLITS, TEMPLATE, UNUSED, USER_DEFINED
from qwen3next.config import LAYER_TYPES, ModelConfig
from qwen3next.files.json_files import read_object

ARCHITECTURES = {model_type: arch for arch, model_type in MODEL_TYPES.items()}
MROPE = [11, 11, 10, 0]  # what llama.cpp requires of Qwen3.5; on text all its positions are the token's


def model_metadata(config: ModelConfig) -> dict[str, Any]:
    """Raises: ValueError for a model that llama.cpp's architectures cannot describe."""
    c, arch = config, ARCHITECTURES.get(config.model_type)
    if arch is None:
        raise ValueError(f"GGUF has no architecture for {c.model_type}: {', '.join(ARCHITECTURES)} can be written.")
    usual = tuple(LAYER_TYPES[(i + 1) % c.full_attention_interval == 0] for i in range(c.num_hidden_layers))
    sparse = {c.is_sparse(i) for i in range(c.num_hidden_layers)}
    for fits, what in (
        (not c.chosen() and c.attention_gate == "elementwise", "a variant of the released model"),
        (c.zero_centred_norms and c.use_qk_norm and not c.attention_bias, "other norms or biases"),
        (c.layer_types == usual, "layer_types that are no regular pattern"),
        (sparse == {arch != "qwen35"}, "dense and sparse layers"),
        (c.norm_topk_prob, "expert weights that are not renormalised"),
    ):
        if not fits:
            raise ValueError(f"GGUF cannot describe {what}: save the model with save_pretrained.")
    found = {key: getattr(c, name) for name, key in SIZES.items()}
    found |= {key: getattr(c, name) for name, key in EXPERTS.items()} if arch != "qwen35" else {}
    found |= {
        "block_count": c.num_hidden_layers + c.mtp_num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.rotary_dim,
        "ssm.inner_size": c.linear_num_value_heads * c.linear_value_head_dim,
        "full_attention_interval": c.full_attention_interval,
    }
    found |= {"nextn_predict_layers": c.mtp_num_hidden_layers} if c.mtp_num_hidden_layers else {}
    found |= {"rope.dimension_sections": MROPE} if arch != "qwen3next" else {}
    if yarn := c.rope_scaling:
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(yarn.factor)}
        found["rope.scaling.original_context_length"] = yarn.original_max_position_embeddings
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in found.items()}


def tokenizer_metadata(folder: Path, metadata: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The tokenizer and chat template of a folder, or of another GGUF file.

    If there is none, or not Qwen's, what llama.cpp needs to open a file without one.
    """
    if not folder.is_dir():
        return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")} or _no_tokenizer(config)
    given = read_object(folder / "tokenizer.json", "a tokenizer", optional=True)
    model, text = given.get("model") or {}, str(given.get("pre_tokenizer"))
    split = next((name for name, pattern in SPLITS.items() if repr(pattern) in text), None)
    if split is None or model.get("type") != "BPE":
        return _no_tokenizer(config)
    tokens, types = [f"[PAD{i}]" for i in range(config.vocab_size)], [UNUSED] * config.vocab_size
    added = [(entry["content"], entry["id"], entry.get("special")) for entry in given.get("added_tokens") or []]
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, 1
    for token, i, special in added:
        tokens[i], types[i] = token, CONTROL if special else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    found: dict[str, Any] = {"model": "gpt2", "pre": split, "tokens": tokens, "token_type": types, "merges": merges}
    if config.stop_tokens:
        found["eos_token_id"] = config.stop_tokens[0]
    for name, key in (("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")):
        if (value := getattr(config, name)) is not None:
            found[key] = value
    whole = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    template = folder / "chat_template.jinja"
    if template.is_file():
        return whole | {TEMPLATE: template.read_text(encoding="utf-8")}
    config_json = read_object(folder / "tokenizer_config.json", "a tokenizer's configuration", optional=True)
    source = config_json.get("chat_template")
    return whole | ({TEMPLATE: source} if isinstance(source, str) else {})


def _no_tokenizer(config: ModelConfig) -> dict[str, Any]:
    return {"tokenizer.ggml.model": "none", f"{ARCHITECTURES[config.model_type]}.vocab_size": config.vocab_size}
