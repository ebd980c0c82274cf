"""Train a model on many GPUs, under torchtitan: FSDP2, HSDP, expert and tensor parallelism.

    python -m recipes.titan --processes 8 --expert 8 --preset base-350m-a100m --out runs/big     # one machine
    torchrun --nnodes 16 --nproc-per-node 8 ... -m recipes.titan --expert 128 ... --out runs/big  # many
    python -m recipes.titan --processes 8 --resume --out runs/big

Settings are those of `python -m recipes.pretrain`, which trains in one process, and the layout. The same settings give
the same losses in every layout, to rounding. Checkpoints do not depend on the layout. docs/scaling.md has the details.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

import qwen3next as q
from recipes.pretrain import LOOK, exit_status, windows_of
from recipes.scaling.evaluation import DividedHeldOut, gathered
from recipes.scaling.launch import RunFailed, launch, lost_connection
from recipes.scaling.layout import check_layout
from recipes.scaling.settings import ScalingSettings, comparable, refuse_single
from recipes.training.evaluation import check_needles, compared, held_out_of
from recipes.training.presets import PRESETS
from recipes.training.report import Metrics
from recipes.training.settings import (
    Prepared,
    model_changes,
    model_config,
    pick_device,
    pick_precision,
    prepare_data,
    recorded,
    refuse_changes,
)
from recipes.training.tokenizer import save_tokenizer, write_atomically

READY = "ready.json"  # the text is prepared, by the launch that it names
WAIT = 24 * 3600.0  # seconds for process 0 to prepare the text


def check(settings: ScalingSettings, world: int) -> None:
    """Refuse what cannot work, before anything starts.

    Raises: ValueError for settings that do not work here.
    """
    if find_spec("torchtitan") is None:
        raise ValueError("torchtitan is not installed: pip install 'qwen3next[titan]' in an environment of its own.")
    if torch._utils._get_available_device_type() is None:
        raise ValueError("torchtitan trains on GPUs and there is none here: use `python -m recipes.pretrain`.")
    refuse_single(settings)
    begun = (settings.out / "settings.json").exists()
    if settings.resume:
        refuse_changes("setting", comparable(recorded(settings.out, ScalingSettings)), comparable(settings))
    elif begun:
        raise ValueError(f"{settings.out} already holds a run: add --resume to continue it, or choose another --out.")
    changes = model_changes(settings.model)
    if not settings.init:  # of a text that is not read yet, the vocabulary is unknown; `work` looks at it again
        changes = {"vocab_size": 1024 * settings.tensor} | changes
    config = _architecture(settings).replace(**changes)
    if settings.init and _shapes(config) != _shapes(_architecture(settings)):
        raise ValueError(f"--model changes sizes of {settings.init}: change only what needs no other weights.")
    check_layout(settings.layout(world), config, settings.batch_size)


def _architecture(settings: ScalingSettings) -> q.ModelConfig:
    place = settings.init or settings.preset
    if Path(place).exists() and place not in q.presets.ALL:
        return q.ModelConfig.load(place)
    return q.presets.named(place.replace("-", "_"))()


def _shapes(config: q.ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in q.Qwen3Next(config).named_parameters()}


def config_of(settings: ScalingSettings, data: Prepared) -> q.ModelConfig:
    """The model's configuration. Raises: ValueError if its vocabulary is smaller than the text's."""
    if settings.init:
        config = _architecture(settings).replace(**model_changes(settings.model))
    else:
        config = model_config(settings, data.tokenizer)
    if (size := data.tokenizer.get_vocab_size()) > config.vocab_size:
        raise ValueError(
            f"The text has {size} kinds of tokens and the model a vocabulary of {config.vocab_size}: "
            "use the model's own tokenizer, or a larger --model vocab_size."
        )
    return config


def prepare(settings: ScalingSettings) -> Prepared:
    """Tokenizer, text and the run's settings in its folder; existing ones are reused."""
    data = prepare_data(settings)
    values = asdict(settings) | {"out": str(settings.out), "resume": False}
    write_atomically(settings.out / "settings.json", (json.dumps(values, indent=2) + "\n").encode())
    return data


def work(settings: ScalingSettings) -> None:
    """One process of the run, which torchrun or `launch` has started."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    launch_id = "-".join(os.environ.get(x, "") for x in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"))
    ready = settings.out / READY
    if rank == 0:
        check(settings, world)
        data = prepare(settings)
        write_atomically(ready, json.dumps(launch_id).encode())
    else:
        _wait_for(ready, launch_id)
        data = prepare_data(replace(settings, resume=True))
    config, layout = config_of(settings, data), settings.layout(world)
    check_layout(layout, config, settings.batch_size)
    device = pick_device("cuda" if torch.cuda.is_available() else "cpu")
    precision, why = pick_precision(settings.precision, device)
    from recipes.scaling.engine import build  # torchtitan, which is optional

    rows = max(2 * settings.batch_size // layout.data, 1)  # of a batch without gradients, on one process
    whole = held_out_of(data, window=settings.window, batch_size=rows)
    check_needles(whole, settings.needles)
    trainer = build(settings, config, windows_of(settings, data), layout, precision=precision)
    model: Any = trainer.model_parts[0]
    held_out = DividedHeldOut(whole.batches, batch=model.batch, tensor=model.tensor)
    look, depths = held_out.part(LOOK).look, settings.mtp_depths
    trainer.look = partial(look, precision=precision, mtp_depths=depths, needles=settings.needles)
    if rank == 0:
        write_atomically(settings.out / "model.json", (json.dumps(config.to_dict(), indent=2) + "\n").encode())
        console = Console()
        console.print(f"{layout} on {world} processes, {precision} ({why}), in {settings.out}.", highlight=False)
        step = _saved_step(settings.out)
        trainer.report = Metrics(
            settings.out, step=step, tensorboard=settings.tensorboard, console=console, tracker=settings.tracker
        )
        trainer.say = partial(console.print, highlight=False, soft_wrap=True)
    try:
        trainer.train()
        trainer.checkpointer.maybe_wait_for_saving()
        result = measured(trainer, held_out, settings.out, precision=precision)
    finally:
        if trainer.report is not None:
            trainer.report.close()
    trainer.close()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank == 0:
        from recipes.scaling.checkpoints import export

        for name, average in (("model", False), ("model-ema", True)):
            if not average or settings.ema:
                export(settings.out, settings.out / name, average=average)
                save_tokenizer(data.tokenizer, settings.out / name)
        write_atomically(settings.out / "result.json", (json.dumps(result, indent=1) + "\n").encode())
        print(
            f"{result['bits_per_byte']:.3f} bits per byte (gzip -9 {result['gzip']:.3f}, xz -9 {result['xz']:.3f}) on "
            f"held-out text after {result['steps']} steps. The model is in {settings.out / 'model'}."
        )


def measured(trainer: Any, held_out: DividedHeldOut, out: Path, *, precision: str) -> dict[str, Any]:
    """Bits per byte on all held-out documents, with all processes; the fields of `pretrain.Result` that these give."""
    model, average = trainer.model_parts[0], trainer.average

    def nats() -> dict[str, dict[int, float]]:
        return gathered(model, partial(held_out.nats, precision=precision))

    result = compared(held_out, nats(), out) | {"steps": trainer.step, "precision": precision}
    if average is not None:
        average.exchange(model)
        result["ema_bits_per_byte"] = held_out.bits_per_byte(nats())[""]
        average.exchange(model)
    return result


def _saved_step(out: Path) -> int:
    """The last step whose checkpoint is complete; 0 if there is none."""
    return max((int(path.parent.name.split("-")[1]) for path in out.glob("checkpoint/step-*/.metadata")), default=0)


def _wait_for(ready: Path, launch_id: str) -> None:
    end = time.monotonic() + WAIT
    while not ready.is_file() or json.loads(ready.read_bytes()) != launch_id:
        if time.monotonic() > end:
            raise ValueError(f"{ready} did not appear: process 0 must write to the same folder as the others.")
        time.sleep(0.2)


def command(settings: ScalingSettings) -> str:
    """The command line that resumes a run on one machine."""
    words = ["python -m recipes.titan"]
    words += [f"--{name} {getattr(settings, name)}" for name in ("processes", "tensor", "expert", "replicate")]
    return " ".join([*words, "--resume --out", shlex.quote(str(settings.out))])


def main(args: list[str] | None = None, *, module: str = "recipes.titan") -> int:
    """The command line; returns the exit status.

    Args:
        module: what each process runs.
    """
    given = sys.argv[1:] if args is None else args

    def program() -> None:
        prog = "python -m recipes.titan"
        settings = tyro.cli(ScalingSettings, args=given, prog=prog)
        base = recorded(settings.out, ScalingSettings) if settings.resume else _defaults(settings.preset)
        base = replace(base, processes=0)
        settings = tyro.cli(ScalingSettings, args=given, prog=prog, default=base)
        if "RANK" in os.environ:
            with lost_connection():
                work(settings)
            return
        if not settings.processes:
            raise ValueError("No processes were started: give --processes N, or start this with torchrun or Slurm.")
        check(settings, settings.processes)
        try:
            launch(module, given, settings.processes)
        except RunFailed as failed:
            raise ValueError(f"{failed} Go on with: {command(settings)}") from None

    return _status(program)


def _status(program: Callable[[], None]) -> int:
    """In a process of a run whose process 0 speaks for all, others leave without a word."""
    if int(os.environ.get("RANK", 0)):
        try:
            program()
        except (ValueError, FloatingPointError, KeyboardInterrupt):
            return 1
        return 0
    return exit_status(program)


def _defaults(preset: str) -> ScalingSettings:
    """The preset's settings."""
    found = PRESETS.get(preset)
    return replace(ScalingSettings(preset=preset), **(found.settings if found else {}))


if __name__ == "__main__":
    sys.exit(main())
