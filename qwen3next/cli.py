"""The `qwen3next` command: its subcommands, and how their errors become messages and exit statuses."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Union

import torch
import tyro

from layers.cpp import cpu
from qwen3next import presets
from qwen3next.commands.ask import ask
from qwen3next.commands.chat import chat
from qwen3next.commands.context import context
from qwen3next.commands.convert import convert
from qwen3next.commands.diff import diff
from qwen3next.commands.explain import explain
from qwen3next.commands.generate import generate
from qwen3next.commands.inspect import inspect
from qwen3next.commands.quantize import quantize
from qwen3next.commands.serve import serve
from qwen3next.commands.tune import tune_here
from qwen3next.commands.verify import verify

# A command returns its exit status, or None for 0. Its docstring is its help; the first line is its table entry.
COMMANDS: dict[str, Callable[..., int | None]] = {
    "generate": generate,
    "chat": chat,
    "ask": ask,
    "serve": serve,
    "inspect": inspect,
    "explain": explain,
    "tune": tune_here,
    "context": context,
    "verify": verify,
    "convert": convert,
    "quantize": quantize,
    "diff": diff,
}

DESCRIPTION = f"""The Qwen3-Next architecture at the command line.

A checkpoint (DIR) is a folder with config.json, *.safetensors and tokenizer.json in the released layout.
A preset is a configuration without weights: {", ".join(presets.ALL)}.
`qwen3next COMMAND --help` explains the options of a command and gives examples."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or with sys.argv if None.

    Returns: the exit status. 0: success; 1: `verify` or `diff` found something; 2: an error, with one sentence on
        stderr; 130: Ctrl-C; 141: a closed pipe.
    """
    args = sys.argv[1:] if args is None else args
    keep_to_processors()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"qwen3next: {message}", file=sys.stderr)
            return _run(args) or 0
    except BrokenPipeError:
        # Python flushes stdout again at exit and would print an error for the same closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        # torch appends long native stack traces to some messages; the first line says what happened.
        sentence = (str(error) or repr(error)).splitlines()[0]
        print(f"qwen3next: {sentence}", file=sys.stderr)
        return 2


def keep_to_processors() -> None:
    """Have torch start no more threads than a container's quota lets run; torch itself knows the affinity alone.

    OMP_NUM_THREADS, where it is set, decides.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cpu.processors():
        torch.set_num_threads(cpu.processors())


def _run(args: Sequence[str]) -> int | None:
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.UseAppendAction)
    if args and args[0] in COMMANDS:
        return tyro.cli(COMMANDS[args[0]], prog=f"qwen3next {args[0]}", args=args[1:], config=config)
    # No command or an unknown one: tyro prints the table for --help, or an error for a misspelt name.
    table: Any = Union[  # noqa: UP007
        tuple(
            Annotated[Any, tyro.conf.subcommand(name=name, constructor=command, description=_summary(command))]
            for name, command in COMMANDS.items()
        )
    ]
    return tyro.cli(table, prog="qwen3next", description=DESCRIPTION, args=args, config=config)


def _summary(command: Callable[..., int | None]) -> str:
    return (command.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
