"""`qwen3next inspect`: parameters, layers and shapes of a configuration."""

from qwen3next.commands.common import Target, config_of, print_json, show
from qwen3next.inspect import describe, hook_lines, hook_table, summary


def inspect(target: Target, hooks: bool = False, json: bool = False) -> None:
    """Describe a model: parameters, layers, shapes, bytes of context. Reads config.json only; takes seconds.

    A released config.json does not tell whether the checkpoint has an MTP layer: one is counted.

    $ qwen3next inspect qwen3_next_80b_a3b
    $ qwen3next inspect DIR
    $ qwen3next inspect tiny --hooks | grep blocks.0

    Args:
        target: checkpoint folder, config.json, or name of a preset.
        hooks: print the model's hook points instead, one per line: name, shape, dtype, what makes it fire.
        json: print one JSON object.
    """
    config = config_of(target)
    if json:
        names = ("name", "shape", "dtype", "route")
        print_json([dict(zip(names, row, strict=True)) for row in hook_table(config)] if hooks else summary(config))
    elif hooks:
        print("\n".join(hook_lines(config)), flush=True)
    else:
        show(describe(config))
