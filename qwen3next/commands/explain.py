"""`qwen3next explain`: which implementation runs, and why."""

from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.table import Table

from qwen3next.commands.common import Dtype, Target, config_of, print_json, show
from qwen3next.explain import explain as explain_model
from qwen3next.inputs import as_device, as_dtype
from qwen3next.inspect import on_meta


def explain(target: Target, device: str = "auto", dtype: Dtype = "auto", json: bool = False) -> None:
    """Print for each operation which implementation would run, why, and what would be faster.

    The result describes this installation. The model is not loaded.

    $ qwen3next explain DIR
    $ qwen3next explain qwen3_next_80b_a3b --device cuda

    Args:
        target: checkpoint folder, config.json, or name of a preset.
        device: auto (CUDA if available), cpu, cuda, ...
        dtype: auto is the dtype in config.json, else float32.
        json: print one JSON object.
    """
    config = config_of(target)
    named = config.extra.get("dtype") or config.extra.get("torch_dtype") or "float32"
    kind = as_dtype(str(named) if dtype == "auto" else dtype)
    where = as_device(device)
    rows = explain_model(on_meta(config), device=where, dtype=kind)
    if json:
        name = str(kind).removeprefix("torch.")
        print_json({"device": str(where), "dtype": name, "operations": [asdict(row) for row in rows]})
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for header in ("operation", "runs", "why", "what would be faster"):
        table.add_column(header)
    for row in rows:
        table.add_row(row.operation, row.runs, row.why, row.faster)
    print(f"on {where}, in {str(kind).removeprefix('torch.')}:")
    show(table)
