"""Estimate memory, speed and days of a training run on many GPUs, and rank the layouts that fit.

    python -m recipes.plan --preset qwen3_next_80b_a3b --gpus 64
    python -m recipes.plan --preset qwen3_next_80b_a3b --gpus 128 --tokens 15e12

Everything printed is an estimate. Memory is counted tensor by tensor; speed is a stated share of the peak for products,
plus the time of messages at stated rates. It never gives more than the highest rate that was measured in public for a
mixture of this kind on that GPU (`RATES`).
"""

import sys
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

import qwen3next as q
from qwen3next.inspect import count_parameters
from recipes.pretrain import exit_status
from recipes.training.flops import forward_flops, training_flops
from recipes.training.settings import model_changes


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU.

    Attributes:
        memory: bytes.
        peak: dense bf16 FLOP/s.
        reached: FLOP/s of the best public training of a mixture of experts, in bf16 where it is known.
        inside, between: bytes a second of a GPU to others of its node, and of other nodes, in one direction.
        node: GPUs that are joined by the fast links.
    """

    memory: float
    peak: float
    reached: float
    inside: float
    between: float
    node: int = 8


# reached: H100 328 TFLOP/s (NeMo AutoModel, Nemotron 3 Nano 30B); A100 and H200 by the share of the H100's peak.
# B200 and B300 by the same share: no public bf16 figure was found. Links are data sheets' at 80 %.
RATES = {
    "a100": Gpu(80e9, 312e12, 103e12, 240e9, 20e9),
    "h100": Gpu(80e9, 989e12, 328e12, 360e9, 40e9),
    "h200": Gpu(141e9, 989e12, 328e12, 360e9, 40e9),
    "b200": Gpu(180e9, 2250e12, 746e12, 720e9, 40e9),
    "b300": Gpu(270e9, 2250e12, 746e12, 720e9, 80e9),
}
RESERVED = 6e9  # CUDA context, NCCL's buffers, workspaces
FRAGMENTS = 1.1  # the allocator's unused share of activations
STARTED = 0.65  # share of `reached` of a run without tuning, which is what ranks use


@dataclass(frozen=True)
class Options:
    """Estimate a run on many GPUs.

    Attributes:
        preset: a name in qwen3next.presets, or a config.json.
        model: changes of the configuration's fields, as num_hidden_layers=24.
        gpus: how many.
        gpu: their kind: a100, h100, h200, b200, b300.
        tokens: tokens of the run.
        sequence: tokens of a sequence.
        batch: sequences of a step, over all GPUs.
        most: layouts to print.
    """

    preset: str = "qwen3_next_80b_a3b"
    model: tuple[str, ...] = ()
    gpus: int = 64
    gpu: str = "h100"
    tokens: float = 1e12
    sequence: int = 4096
    batch: int = 1024
    most: int = 8

    def __post_init__(self) -> None:
        if self.gpu not in RATES:
            raise ValueError(f"There are no rates for {self.gpu!r}: choose {', '.join(RATES)}.")
        for name in ("gpus", "tokens", "sequence", "batch", "most"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: choose a number above 0.")


@dataclass(frozen=True)
class Layout:
    """How a model lies on the GPUs.

    Attributes:
        expert: GPUs over which the experts of a layer are divided (EP); each token's rows are sent to them.
        tensor: GPUs over which heads, shared expert and head are divided (TP), within a node.
        recompute: parts that are made again in the backward pass: "", "mlp" or "all".
    """

    expert: int
    tensor: int
    recompute: str

    def __str__(self) -> str:
        return f"FSDP, EP {self.expert}, TP {self.tensor}" + (f", recompute {self.recompute}" if self.recompute else "")


@dataclass(frozen=True)
class Estimate:
    """Bytes a GPU by part, and speed."""

    layout: Layout
    memory: dict[str, float]
    tokens_per_gpu: float
    days: float

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def estimates(config: q.ModelConfig, options: Options) -> list[Estimate]:
    """Every layout that fits into the memory, the fastest first.

    Raises: ValueError if none fits, or the batch has fewer sequences than there are groups of GPUs.
    """
    gpu, found, tight = RATES[options.gpu], [], float("inf")
    for layout in layouts(config, options):
        one = estimate(config, layout, options)
        tight = min(tight, one.total)
        if one.total <= gpu.memory:
            found.append(one)
    if not found:
        need = (
            "no layout divides this batch" if tight == float("inf") else f"the least needs {tight / 1e9:.0f} GB a GPU"
        )
        raise ValueError(
            f"Nothing fits on {options.gpus} {options.gpu} ({need} of {gpu.memory / 1e9:.0f}): "
            "take more GPUs, a shorter --sequence or another --batch."
        )
    return sorted(found, key=lambda e: (-e.tokens_per_gpu, e.total))


def layouts(config: q.ModelConfig, options: Options) -> list[Layout]:
    """Those that divide heads, experts, GPUs and the batch."""
    powers = [2**i for i in range(12)]
    experts = [n for n in powers if n <= options.gpus and options.gpus % n == 0 and (config.num_experts or 1) % n == 0]
    heads = (config.num_key_value_heads, config.linear_num_key_heads)
    tensor = [
        n for n in powers if n <= RATES[options.gpu].node and options.gpus % n == 0 and not any(h % n for h in heads)
    ]
    found = []
    for e, t, recompute in product(experts, tensor, ("", "mlp", "all")):
        groups = options.gpus // t
        if groups <= options.batch and options.batch % groups == 0 and (e == 1 or e % t == 0 or t == 1):
            found.append(Layout(e, t, recompute))
    return found


def estimate(config: q.ModelConfig, layout: Layout, options: Options) -> Estimate:
    """One layout; a GPU runs one sequence at a time and adds up gradients."""
    gpu, memory = RATES[options.gpu], memory_by_part(config, layout, options)
    per_token = training_flops(config, options.sequence)
    forward = forward_flops(config, options.sequence)
    again = {"": 0.0, "mlp": forward["feed_forward"], "all": sum(forward.values()) - forward["head"]}[layout.recompute]
    rate = STARTED * gpu.reached
    seconds = (per_token + again) / layout.tensor / rate  # of a token on the GPUs that share it
    seconds += messages(config, layout, options)
    tokens = 1 / seconds / layout.tensor
    tokens = min(tokens, gpu.reached / per_token)
    return Estimate(layout, memory, tokens, options.tokens / (tokens * options.gpus) / 86_400)


def memory_by_part(config: q.ModelConfig, layout: Layout, options: Options) -> dict[str, float]:
    """Bytes a GPU. Weights are kept in fp32 with AdamW's two moments and fp32 gradients, and run in bf16."""
    dense, experts = _parameters(config)
    shard = options.gpus  # FSDP divides dense weights over all, experts over all that hold the same ones
    c, t = config, options.sequence
    layers = c.num_hidden_layers + c.mtp_num_hidden_layers
    gathered = max(dense / layers, c.vocab_size * c.hidden_size / layout.tensor) + experts / layers / layout.expert
    logits = 3 * 4.0 * min(t, 1024) * c.vocab_size / layout.tensor  # a part at a time
    return {
        "weights and moments": 12.0 * (dense + experts) / shard,
        "gradients": 4.0 * (dense + experts) / shard,
        "weights of a layer, bf16, and the next": 2 * 2.0 * gathered,
        "activations": FRAGMENTS * activation_bytes(config, layout) * t,
        "logits": logits,
        "reserved": RESERVED,
    }


def activation_bytes(config: q.ModelConfig, layout: Layout) -> float:
    """Bytes that a token's forward pass keeps on a GPU for the backward pass, in bf16."""
    c, width, total = config, config.hidden_size, 0.0
    for layer, kind in enumerate((*c.layer_types, *["full_attention"] * c.mtp_num_hidden_layers)):
        if kind == "linear_attention":
            keys, values = c.conv_channels, c.linear_num_value_heads * c.linear_value_head_dim
            # Input, qkv before and after the convolution, normed q and k in fp32, z, output before and after the gate.
            mixer = 2.0 * width + (2 * 2.0 * keys + 2 * 2.0 * keys / 2 + 4 * 2.0 * values) / layout.tensor
        else:
            inner = c.num_attention_heads * c.head_dim
            kv = 2 * c.num_key_value_heads * c.head_dim
            mixer = 2.0 * width + (2.0 * 5 * inner + 2.0 * 2 * kv) / layout.tensor
        sparse = c.is_sparse(layer) if layer < c.num_hidden_layers else c.num_experts > 0
        if sparse:
            rows = c.num_experts_per_tok * (
                2 * width + 3 * c.moe_intermediate_size
            )  # sent, returned, gate, up, product
            shared = 3 * c.shared_expert_intermediate_size / layout.tensor
            mlp = 2.0 * (width + rows + shared) + 4.0 * 2 * c.num_experts
        else:
            mlp = 2.0 * (width + 3 * c.intermediate_size / layout.tensor)
        kept = {"": mixer + mlp, "mlp": mixer + 2.0 * width, "all": 2.0 * width}[layout.recompute]
        total += kept + 2 * 2.0 * width  # the residual stream, and a norm's input
    return total


def messages(config: q.ModelConfig, layout: Layout, options: Options) -> float:
    """Seconds of messages a token, for the GPUs that share it, not hidden behind products.

    FSDP's messages are taken as hidden half; those of experts and TP as not hidden.
    """
    gpu, c, t = RATES[options.gpu], config, options.sequence
    dense, experts = _parameters(config)
    layers = c.num_hidden_layers + c.mtp_num_hidden_layers
    link = gpu.inside if options.gpus <= gpu.node else gpu.between
    # Weights are gathered for forward and backward and gradients scattered, once a sequence of each GPU.
    fsdp = 0.5 * 3 * 2.0 * (dense + experts / layout.expert) / link / t
    outside = max(layout.expert - gpu.node, 0) / layout.expert  # share of the rows that leave the node
    rows = 4 * 2.0 * c.num_experts_per_tok * c.hidden_size * layers  # there and back, forward and backward
    expert = rows * (outside / gpu.between + (1 - outside) / gpu.inside) if layout.expert > 1 and c.num_experts else 0.0
    tensor = 4 * 2.0 * 2 * c.hidden_size * layers / gpu.inside if layout.tensor > 1 else 0.0
    return fsdp + expert / layout.tensor + tensor


@cache
def _parameters(config: q.ModelConfig) -> tuple[float, float]:
    """Parameters outside and inside of routed experts, the MTP layer's among them."""
    counted, c = count_parameters(config), config
    sparse = sum(c.is_sparse(i) for i in range(c.num_hidden_layers))
    sparse += c.mtp_num_hidden_layers if c.num_experts else 0
    experts = float(sparse * c.num_experts * 3 * c.hidden_size * c.moe_intermediate_size)
    return counted.main + counted.mtp - experts, experts


def report(config: q.ModelConfig, options: Options, console: Console) -> list[Estimate]:
    """Print the layouts, and the memory of the first by part."""
    found = estimates(config, options)
    counted = count_parameters(config)
    console.print(
        f"Estimates, not measurements: {options.preset}, {counted.main / 1e9:.1f}B parameters, "
        f"{counted.active / 1e9:.1f}B active, on {options.gpus} {options.gpu}, {options.batch} sequences of "
        f"{options.sequence} tokens a step, {options.tokens:.3g} tokens; "
        f"products run at {STARTED * RATES[options.gpu].reached / 1e12:.0f} TFLOP/s.",
        highlight=False,
        soft_wrap=True,
    )
    made = Table("layout", "GB a GPU", "tok/s a GPU", "TFLOP/s a GPU", "tok/s", "days")
    for one in found[: options.most]:
        useful = one.tokens_per_gpu * training_flops(config, options.sequence) / 1e12
        speed = f"{one.tokens_per_gpu:,.0f}", f"{useful:.0f}", f"{one.tokens_per_gpu * options.gpus:,.0f}"
        made.add_row(str(one.layout), f"{one.total / 1e9:.1f}", *speed, f"{one.days:,.1f}")
    console.print(made)
    parts = Table("part of the first layout", "GB a GPU")
    for part, size in found[0].memory.items():
        parts.add_row(part, f"{size / 1e9:.2f}")
    console.print(parts)
    return found


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def program() -> None:
        options = tyro.cli(Options, args=args, prog="python -m recipes.plan")
        preset = options.preset
        path = Path(preset)
        config = q.ModelConfig.load(path) if path.exists() else q.presets.named(preset.replace("-", "_"))()
        report(config.replace(**model_changes(options.model)), options, Console())

    return exit_status(program)


if __name__ == "__main__":
    sys.exit(main())
