"""The `qwen3next` command: its subcommands, and how their errors become messages and exit statuses."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, Union

import torch
import tyro

import qwen3next
from layers.cpp import cpu
from qwen3next import presets
from qwen3next.commands.ask import ask
from qwen3next.commands.chat import chat
from qwen3next.commands.context import context
from qwen3next.commands.convert import convert
from qwen3next.commands.diff import diff
from qwen3next.commands.doctor import doctor
from qwen3next.commands.explain import explain
from qwen3next.commands.generate import generate
from qwen3next.commands.inspect import inspect
from qwen3next.commands.quantize import quantize
from qwen3next.commands.serve import serve
from qwen3next.commands.tune import tune_here
from qwen3next.commands.verify import verify

Shell = Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]


def completion(shell: Shell) -> None:
    """Print a script with which a shell completes commands and options.

    $ qwen3next completion bash > ~/.local/share/bash-completion/completions/qwen3next
    $ qwen3next completion zsh > ~/.zfunc/_qwen3next        # a folder in $fpath
    $ qwen3next completion fish > ~/.config/fish/completions/qwen3next.fish

    Args:
        shell: the shell that will read it.
    """
    with suppress(SystemExit):  # tyro ends the process behind the script
        _all_commands(["--tyro-print-completion", shell])


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
    "doctor": doctor,
    "completion": completion,
}

CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.UseAppendAction)
DESCRIPTION = f"""The Qwen3-Next architecture at the command line.

A checkpoint (DIR) is a folder with config.json, *.safetensors and tokenizer.json in the released layout.
A preset is a configuration without weights: {", ".join(presets.ALL)}.
`qwen3next COMMAND --help` explains the options of a command and gives examples."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or with sys.argv if None.

    Returns: the exit status. 0: success; 1: `verify`, `diff` or `doctor` found something; 2: an error, with one
        sentence on stderr; 130: Ctrl-C; 141: a closed pipe.
    """
    args = sys.argv[1:] if args is None else args
    keep_to_processors()
    try:
        cpu.choice()  # a wrong QWEN3NEXT_CPU ends every command, also those that run no kernel
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
        if "-v" in args or "--verbose" in args:
            traceback.print_exception(error)
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
    if args and args[0] in COMMANDS:
        return tyro.cli(COMMANDS[args[0]], prog=f"qwen3next {args[0]}", args=args[1:], config=CONFIG)
    if list(args) == ["--version"]:
        print(f"qwen3next {qwen3next.__version__}")
        return 0
    # No command or an unknown one: tyro prints the table for --help, or an error for a misspelt name.
    return _all_commands(args)


def _all_commands(args: Sequence[str]) -> int | None:
    table: Any = Union[  # noqa: UP007
        tuple(
            Annotated[Any, tyro.conf.subcommand(name=name, constructor=command, description=_summary(command))]
            for name, command in COMMANDS.items()
        )
    ]
    return tyro.cli(table, prog="qwen3next", description=DESCRIPTION, args=args, config=CONFIG)


def _summary(command: Callable[..., int | None]) -> str:
    return (command.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
