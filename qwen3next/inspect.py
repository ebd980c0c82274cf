"""Parameters, layers and bytes of context of a configuration, without allocating the model."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from torch import nn

from layers.moe import Experts
from qwen3next.api import Qwen3Next
from qwen3next.checkpoints.group_weights import layouts_for
from qwen3next.checkpoints.memory_needs import bytes_needed
from qwen3next.checkpoints.reader import stays_exact
from qwen3next.config import ModelConfig
from qwen3next.files.sizes import binary

CONTEXTS = (4096, 32_768, 262_144, 1_048_576)


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        main: the model without the MTP layer. A tied head is counted once, as the embedding.
        mtp: the MTP layer, without the embedding and head that it shares with the main model.
        active: parameters that a token of the main model uses: all of `main`, but only the fraction
            top_k / experts of the routed experts. The whole embedding is counted, although a token reads one row.
        embedding: the embedding alone. An untied head has the same number, counted in `main` and `active`.
    """

    main: int
    mtp: int
    active: int
    embedding: int

    @property
    def total(self) -> int:
        """Parameters that a checkpoint stores: main model and MTP layer."""
        return self.main + self.mtp


def on_meta(config: ModelConfig) -> Qwen3Next:
    """The model on the meta device: names, shapes and hook points, without allocated parameters."""
    with torch.device("meta"):
        return Qwen3Next(config)


def count_parameters(config: ModelConfig) -> Counts:
    """Count the parameters of a configuration without allocating them; takes seconds for the largest."""
    return _counts(on_meta(config))


def _counts(model: Qwen3Next) -> Counts:
    total, active = _total_and_active(model, model.config)
    mtp, mtp_active = (0, 0) if model.mtp is None else _total_and_active(model.mtp, model.config)
    return Counts(total - mtp, mtp, active - mtp_active, model.embed_tokens.weight.numel())


def _total_and_active(module: nn.Module, config: ModelConfig) -> tuple[int, int]:
    """Parameters of a module, and those that a token uses; shared parameters are counted once."""
    total = sum(p.numel() for p in module.parameters())
    routed = sum(p.numel() for m in module.modules() if isinstance(m, Experts) for p in m.parameters())
    # Integer division is exact: all experts have the same size.
    return total, total - routed + routed * config.num_experts_per_tok // max(config.num_experts, 1)


def describe(config: ModelConfig) -> Group:
    """Tables to print with rich: the model, the layers by kind, the parameters of each kind, the bytes of context."""
    model = on_meta(config)
    kinds: dict[tuple[str, bool], list[int]] = {}
    for i, mixer in enumerate(config.layer_types):
        kinds.setdefault((mixer, config.is_sparse(i)), []).append(i)
    parts = [("model", _model_table(model)), ("layers by kind", _layer_table(model, kinds))]
    for (mixer, sparse), layers in kinds.items():
        title = f"parameters of a layer: {_mixer(mixer)}, {'mixture of experts' if sparse else 'dense'}"
        parts.append((title, _parameter_table(model.blocks[layers[0]])))
    title = "context of one sequence: KV cache with 2 bytes per element, recurrent state in fp32, without MTP"
    parts.append((title, _context_table(config)))
    return Group(*(line for title, table in parts for line in (f"[bold]{title}[/bold]", table, "")))


def hook_lines(config: ModelConfig) -> list[str]:
    """The model's hook points, one per line: name, shape with this config's sizes, dtype, and what makes it fire."""
    rows = hook_table(config)
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return ["  ".join([*map(str.ljust, row, widths), row[3]]).rstrip() for row in rows]


def hook_table(config: ModelConfig) -> list[tuple[str, str, str, str]]:
    """Name, shape, dtype and route of the model's hook points."""
    return [(name, _dims(config, name, p.shape), p.dtype, p.route) for name, p in on_meta(config).hook_dict.items()]


def summary(config: ModelConfig) -> dict[str, Any]:
    """What `describe` shows, as numbers: parameters, bytes of weights and context, and the layers by kind."""
    model = on_meta(config)
    counts = _counts(model)
    layers = [
        {
            "mixer": config.layer_types[i],
            "sparse": config.is_sparse(i),
            "parameters": {name: list(p.shape) for name, p in block.named_parameters()},
        }
        for i, block in enumerate(model.blocks)
    ]
    return {
        "model_type": config.model_type,
        "parameters": {**asdict(counts), "total": counts.total},
        "weights_bytes_bf16": bytes_needed(model, lambda name: torch.float32 if stays_exact(name) else torch.bfloat16),
        "bytes_per_token": config.bytes_per_token(),
        "bytes_per_sequence": config.bytes_per_sequence(),
        "longest_context": config.longest_context,
        "layers": layers,
    }


def _dims(config: ModelConfig, name: str, shape: str) -> str:
    """A shape such as "b t h v" with the sizes that do not depend on the input: "b t h=4 v=24"."""
    sizes = hook_sizes(config, name)
    return " ".join(f"{d}={sizes[d]}" if d in sizes else d for d in shape.split())


def hook_sizes(config: ModelConfig, name: str) -> dict[str, int]:
    """The sizes of the letters in a hook point's shape that the config determines; heads are those of its layer."""
    c = config
    sizes = {"width": c.hidden_size, "vocab": c.vocab_size, "e": c.num_experts, "top_k": c.num_experts_per_tok}
    if ".linear_attn." in name:
        sizes |= {"h": c.linear_num_value_heads, "kh": c.linear_num_key_heads, "channels": c.conv_channels}
        sizes |= {"k": c.linear_key_head_dim, "v": c.linear_value_head_dim}
    elif ".self_attn." in name:
        sizes |= {"h": c.num_attention_heads, "kh": c.num_key_value_heads, "d": c.head_dim}
        sizes |= {"switch": c.attention_switch_experts}
    return sizes


def _table(*headers: str, numbers_from: int) -> Table:
    table = Table(box=SIMPLE_HEAD, show_header=any(headers), show_edge=False, pad_edge=False)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i >= numbers_from else "left")
    return table


def _model_table(model: Qwen3Next) -> Table:
    c, counts = model.config, _counts(model)
    table = _table("", "", numbers_from=2)
    head = "tied to the embedding" if c.tie_word_embeddings else "a matrix of its own"
    mtp = f", and {short(counts.mtp)} in the MTP layer" if counts.mtp else ", no MTP layer"
    table.add_row("parameters", short(counts.main) + mtp)
    table.add_row("active a token", f"{short(counts.active)}, embedding and head included, MTP not")
    needs = bytes_needed(model, lambda name: torch.float32 if stays_exact(name) else torch.bfloat16)
    if needs["memory"] > needs["disk"]:
        places = f'{binary(needs["int8"])} with experts="int8", {binary(needs["disk"])} with experts="disk"'
        table.add_row("weights in bf16", f"{binary(needs['memory'])}, {places} and its cache")
    else:
        table.add_row("weights in bf16", binary(needs["memory"]))
    table.add_row("weights in groups", ", ".join(_in_groups(model, weights) for weights in ("int8", "int4")))
    table.add_row("embedding", f"{c.vocab_size} x {c.hidden_size} = {short(counts.embedding)}; head: {head}")
    if c.chosen() or c.attention_gate == "head_shared":
        gate = {"attention_gate": c.attention_gate} if c.has_attention_variant else {}
        table.add_row("variant", ", ".join(f"{name} {value}" for name, value in (gate | c.chosen()).items()))
    table.add_row("longest context", f"{c.max_position_embeddings} tokens in training")
    table.add_row("RoPE", f"first {c.rotary_dim} of {c.head_dim} dimensions, theta {c.rope_theta:,.0f}")
    return table


def _in_groups(model: Qwen3Next, weights: str) -> str:
    """Bytes of all weights with `weights=` of `q.load`."""
    kinds = lambda name: torch.float32 if stays_exact(name) else torch.bfloat16  # noqa: E731
    needs = bytes_needed(model, kinds, layouts_for(model, weights))
    return f'{binary(needs["memory"])} with weights="{weights}"'


def _layer_table(model: Qwen3Next, kinds: dict[tuple[str, bool], list[int]]) -> Table:
    c = model.config
    table = _table("layers", "token mixer", "feed-forward", "parameters", "active", "memory", numbers_from=3)
    for (mixer, sparse), layers in kinds.items():
        total, active = _total_and_active(model.blocks[layers[0]], c)
        one = c.replace(num_hidden_layers=1, layer_types=(mixer,), mlp_only_layers=())
        if mixer == "full_attention":
            heads = f"{c.num_attention_heads} query, {c.num_key_value_heads} key heads of {c.head_dim}"
            memory = f"{binary(one.bytes_per_token())} a token"
        else:
            key = f"{c.linear_num_key_heads} key heads of {c.linear_key_head_dim}"
            heads = f"{key}, {c.linear_num_value_heads} value heads of {c.linear_value_head_dim}"
            memory = f"{binary(one.bytes_per_sequence())} a sequence"
        feed_forward = f"SwiGLU of {c.intermediate_size}"
        if sparse:
            routed = f"{c.num_experts_per_tok} of {c.num_experts} experts of {c.moe_intermediate_size}"
            feed_forward = f"{routed}, shared of {c.shared_expert_intermediate_size}"
        name = f"{len(layers)} x {_mixer(mixer)}\n{_ranges(layers)}"
        table.add_row(name, heads, feed_forward, f"{short(total)} each", f"{short(active)} each", f"{memory}, each")
    return table


def _parameter_table(block: nn.Module) -> Table:
    table = _table("name", "shape", "numbers", numbers_from=1)
    for name, parameter in block.named_parameters():
        table.add_row(name, " x ".join(map(str, parameter.shape)), f"{parameter.numel():,}")
    return table


def _context_table(config: ModelConfig) -> Table:
    """The last column is for the same model with softmax attention in every layer."""
    table = _table("tokens", "keys and values", "state", "together", "all layers softmax", numbers_from=0)
    softmax = config.replace(layer_types=("full_attention",) * config.num_hidden_layers)
    state = config.bytes_per_sequence()
    for tokens in CONTEXTS:
        kv = tokens * config.bytes_per_token()
        table.add_row(f"{tokens:,}", *map(binary, (kv, state, kv + state, tokens * softmax.bytes_per_token())))
    return table


def _mixer(kind: str) -> str:
    return "Gated DeltaNet" if kind == "linear_attention" else "gated attention"


def _ranges(numbers: list[int]) -> str:
    """Layer numbers as ranges, such as "0-2, 4-6, 8"; a list of more than four is shortened in the middle."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(texts if len(texts) <= 4 else [*texts[:2], "…", texts[-1]])


def short(n: int) -> str:
    """A count with a unit: 79.67B, 311.2M, 41.5K."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size:
            return f"{n / size:.2f}{unit}" if unit == "B" else f"{n / size:.1f}{unit}"
    return str(n)
