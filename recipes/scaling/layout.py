"""How a model lies on processes, and whether it can."""

from dataclasses import dataclass

import torch

import qwen3next as q
from layers.gated_attention import GatedAttention
from layers.gated_deltanet import GatedDeltaNet


@dataclass(frozen=True)
class Layout:
    """A division of `world` processes.

    Attributes:
        replicate: groups that each hold all weights (HSDP); within a group FSDP shards them.
        tensor: processes that share a sequence, each with some of the heads (TP).
        expert: processes over which the experts of a layer are divided (EP); they are also data-parallel.
    """

    world: int
    replicate: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def shard(self) -> int:
        """Processes over which FSDP shards a weight that TP and EP do not divide."""
        return self.world // (self.replicate * self.tensor)

    @property
    def data(self) -> int:
        """Groups of processes that work on different sequences."""
        return self.replicate * self.shard

    def __str__(self) -> str:
        return f"FSDP {self.shard}, EP {self.expert}, TP {self.tensor}, {self.replicate} replicas"


def check_layout(layout: Layout, config: q.ModelConfig, batch_size: int) -> None:
    """Raises: ValueError if the model or the batch cannot be divided so; the message names the size."""
    for name in ("world", "replicate", "tensor", "expert"):
        if getattr(layout, name) < 1:
            raise ValueError(f"{name} is {getattr(layout, name)}: choose a number above 0.")
    world, tensor, expert = layout.world, layout.tensor, layout.expert
    if world % (layout.replicate * tensor):
        raise ValueError(
            f"{world} processes are no multiple of --replicate {layout.replicate} times --tensor {tensor}: "
            "change one of them."
        )
    if batch_size % layout.data:
        raise ValueError(
            f"--batch-size {batch_size} cannot be divided among {layout.data} groups of processes: "
            f"make it a multiple of {layout.data}."
        )
    inside = layout.shard * tensor
    if expert > 1 and not config.num_experts:
        raise ValueError("--expert divides experts, and this model has none: leave it out.")
    if expert > 1 and (inside % expert or config.num_experts % expert):
        raise ValueError(
            f"--expert {expert} must divide the {config.num_experts} experts and the {inside} processes of a replica."
        )
    if (
        expert > 1
        and (config.num_experts // expert) % (inside // expert)
        and (config.moe_intermediate_size % (inside // expert) or config.hidden_size % (inside // expert))
    ):
        raise ValueError(
            f"FSDP cannot divide {config.num_experts // expert} experts over {inside // expert} processes: "
            "choose a larger --expert."
        )
    if tensor > 1:
        _check_tensor(layout, config)


def _check_tensor(layout: Layout, config: q.ModelConfig) -> None:
    c, n = config, layout.tensor
    with torch.device("meta"):
        blocks = q.Qwen3Next(c).blocks
    for block in blocks:
        mixer = block.linear_attn if block.mixer == "linear_attention" else block.self_attn
        if type(mixer) not in (GatedAttention, GatedDeltaNet) or block.sandwich or c.attention_bias:
            raise ValueError("--tensor divides the released layers only, not variants or biases: use --tensor 1.")
    sizes = {"vocab_size": c.vocab_size}
    if "full_attention" in c.layer_types or c.mtp_num_hidden_layers:
        sizes |= {"num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads}
    if "linear_attention" in c.layer_types:
        sizes |= {"linear_num_key_heads": c.linear_num_key_heads, "linear_num_value_heads": c.linear_num_value_heads}
    if c.num_experts:
        sizes["shared_expert_intermediate_size"] = c.shared_expert_intermediate_size
        if layout.expert == 1:
            sizes["moe_intermediate_size"] = c.moe_intermediate_size
    if not all(block.sparse for block in blocks):
        sizes["intermediate_size"] = c.intermediate_size
    for name, size in sizes.items():
        if name == "vocab_size" and size % n:
            raise ValueError(
                f"--tensor {n} does not divide the vocabulary of {size} tokens: add unused ones with "
                f"--model vocab_size={-(-size // n) * n}."
            )
        if size % n:
            raise ValueError(f"--tensor {n} does not divide {name} {size} of this model: choose another --tensor.")
