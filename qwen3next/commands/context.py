"""`qwen3next context`: the memory that a context takes."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from qwen3next.cache.hybrid import HybridCache
from qwen3next.commands.common import Target, config_of, print_json, show
from qwen3next.files.sizes import binary

KV_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def context(
    target: Target, tokens: tuple[str, ...] = (), batch: int = 1, mtp: bool = False, json: bool = False
) -> None:
    """Print how much memory a context takes: KV cache in each dtype, recurrent state, and both together.

    $ qwen3next context qwen3_next_80b_a3b --tokens 256k
    $ qwen3next context DIR --tokens 32k --tokens 1M --batch 8

    Args:
        target: checkpoint folder, config.json, or name of a preset.
        tokens: length of the context, such as 4096, 32k (times 1024) or 1M; may be repeated.
        batch: number of sequences.
        mtp: include the MTP layer's KV cache.
        json: print one JSON object, with numbers of bytes.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}.")
    config = config_of(target)
    if mtp and not config.mtp_num_hidden_layers:
        raise ValueError(f"{target} has no MTP layer: leave --mtp out.")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("tokens", "state", *(f"KV in {kind}" for kind in KV_BYTES), "state and bf16 KV"):
        table.add_column(header, justify="right")
    state = batch * HybridCache.estimate(config, 0)
    rows: list[dict[str, object]] = []
    for length in [parse_tokens(text) for text in tokens or ("4k", "32k", "256k", "1M")]:
        kv = {
            kind: batch * (HybridCache.estimate(config, length, kv_bytes=size, mtp=mtp)) - state
            for kind, size in KV_BYTES.items()
        }
        rows.append({"tokens": length, "state": state, "keys_and_values": kv})
        table.add_row(f"{length:,}", *map(binary, (state, *kv.values(), state + kv["bfloat16"])))
    if json:
        print_json({"batch": batch, "longest_context": config.longest_context, "contexts": rows})
        return
    show(table)
    if config.longest_context:
        print(f"longest context: {config.longest_context:,} tokens" + (" with YaRN" if config.rope_scaling else ""))


def parse_tokens(text: str) -> int:
    """A number of tokens from "4096", "32k" or "1M"; k is 1024, M is 1024². Raises: ValueError for anything else."""
    digits, unit = text[:-1], text[-1:].lower()
    if not unit.isalpha():
        digits, unit = text, ""
    scale = {"": 1, "k": 1024, "m": 1024**2}.get(unit)
    if scale is None or not digits.isdigit() or not int(digits):
        raise ValueError(f"{text!r} is not a number of tokens: write it as 4096, 32k or 1M.")
    return int(digits) * scale
