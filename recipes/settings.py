"""A pretraining run before its first step: its settings, and the device, text and model they ask for."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

import qwen3next as q
from layers.native import cpu
from recipes.data import Baseline, compression_baselines
from recipes.documents import plan_split, split_documents
from recipes.shards import Meta, build_shards, read_meta
from recipes.tokenizer import byte_tokenizer, eos_id, load_tokenizer, save_tokenizer, train_bpe, write_atomically

MEASURED_STEPS = 20  # that tell first how many fit into `minutes`
# What a resumed run may change: nothing here changes the losses.
FREE = {"out", "resume", "eval_every", "save_every", "device", "tensorboard", "recompute"}


@dataclass(frozen=True)
class Settings:
    """Train a Qwen3-Next model from scratch.

    Attributes:
        data: "stdlib" (this Python's standard library), a folder, a glob or a file.
        tokenizer: "bytes", "bpe:N" (learnt from the training documents) or a tokenizer.json.
        preset: a name out of qwen3next.presets, or a config.json; the vocabulary's size is the tokenizer's.
        steps: how long to train, in optimizer steps; 1000 where `minutes` is not given either.
        minutes: how long to train and measure, in minutes: as many steps as fit at the pace of the run.
        batch_size: windows in a micro-batch.
        window: tokens in a window.
        accumulate: micro-batches in a step.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        schedule: "wsd" holds the peak and falls to zero over the last fifth, "cosine" falls all the way to a tenth.
        weight_decay: of matrices and zero-centred norms.
        clip: largest norm of the gradient.
        seed: of weights and order.
        out: the run's folder.
        resume: go on with the run in `out`; settings that are not given are the run's own.
        eval_every: steps between looks at held-out text.
        save_every: steps between saved states.
        device: "auto", "cpu" or "cuda".
        precision: "auto" takes bf16 where the hardware multiplies in it, else fp32.
        recompute: parts of the model that are computed again in the backward pass instead of kept, see
            `Qwen3Next.recompute`: less memory, the same losses.
        tensorboard: write TensorBoard's event files too.
    """

    data: str = "stdlib"
    tokenizer: str = "bpe:4096"
    preset: str = "tiny"
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 4
    window: int = 256
    accumulate: int = 1
    lr: float = 4e-3
    warmup: int = 50
    schedule: Literal["wsd", "cosine"] = "wsd"
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    out: Path = Path("runs/pretrain")
    resume: bool = False
    eval_every: int = 100
    save_every: int = 100
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    recompute: tuple[Literal["linear_attention", "full_attention", "mlp"], ...] = ()
    tensorboard: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "recompute", tuple(self.recompute))  # JSON gives a list
        if self.steps is not None and self.minutes is not None:
            raise ValueError("Both steps and minutes are given: choose one of the two.")
        if self.steps is None and self.minutes is None:
            object.__setattr__(self, "steps", 1000)
        for name in (
            "batch_size",
            "accumulate",
            "steps",
            "eval_every",
            "save_every",
            "minutes",
            "lr",
            "clip",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}: choose a number above 0.")
        if self.window < 2:
            raise ValueError(f"window is {self.window}: choose 2 tokens or more.")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ValueError("warmup and weight_decay must not be negative.")


def pick_device(name: str) -> torch.device:
    """Raises: ValueError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here: choose cpu or auto.")
    return torch.device(name)


def pick_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """("fp32" or "bf16", why). On a CPU that cannot multiply in bf16, torch imitates it, slower than fp32.

    Raises: ValueError where "auto" is asked for and the environment variable QWEN3NEXT_PRECISION is none of the three.
    """
    if wanted != "auto":
        return wanted, "as asked"
    forced = os.environ.get("QWEN3NEXT_PRECISION") or "auto"
    if forced not in ("fp32", "bf16", "auto"):
        raise ValueError(f"QWEN3NEXT_PRECISION is {forced!r}: choose fp32, bf16 or auto.")
    if forced != "auto":
        return forced, "as QWEN3NEXT_PRECISION says"
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU multiplies in it") if able else ("fp32", "this GPU has no bf16")
    if device.type == "cpu" and cpu.can("avx512_bf16"):
        return "bf16", "this CPU multiplies in it"
    return "fp32", "this device has no bf16 multiplication"


def prepare_data(settings: Settings) -> tuple[Tokenizer, Meta]:
    """Tokenizer, shards and the compressors' figures in the run's folder; what is there already is used."""
    out, shards = settings.out, settings.out / "data"
    tokenizer = _tokenizer(settings, out / "tokenizer")
    save_tokenizer(tokenizer, out / "tokenizer")
    if settings.resume and (shards / "meta.json").is_file() and (out / "baselines.json").is_file():
        return tokenizer, read_meta(shards)  # the run's own text, whatever became of the source
    meta = build_shards(settings.data, tokenizer, shards)
    baselines = [b._asdict() for b in compression_baselines(_texts(settings.data, "val"))]
    write_atomically(out / "baselines.json", (json.dumps(baselines, indent=1) + "\n").encode())
    return tokenizer, meta


def read_baselines(out: Path) -> list[Baseline]:
    """What compressors make of a run's held-out documents, in shard order."""
    return [Baseline(**values) for values in json.loads((out / "baselines.json").read_bytes())]


def _tokenizer(settings: Settings, folder: Path) -> Tokenizer:
    wanted = settings.tokenizer
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    if wanted == "bytes":
        return byte_tokenizer()
    if not wanted.startswith("bpe:"):
        return load_tokenizer(wanted)
    if not wanted[4:].isdecimal():
        raise ValueError(f'tokenizer is {wanted!r}: give "bytes", "bpe:4096" or a tokenizer.json.')
    # From the training documents alone: held-out text must not shape the tokens it is measured in.
    return train_bpe((text for _, text in _texts(settings.data, "train")), vocab_size=int(wanted[4:]))


def _texts(source: str, split: str) -> Iterator[tuple[str, str]]:
    return ((name, text) for side, name, text in split_documents(source, plan_split(source)) if side == split)


def model_config(preset: str, tokenizer: Tokenizer) -> q.ModelConfig:
    """A preset or a config.json, with the tokenizer's vocabulary.

    Raises: ValueError for a preset that does not exist.
    """
    sizes: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": eos_id(tokenizer)}
    if Path(preset).exists() and preset not in q.presets.ALL:
        return q.ModelConfig.load(preset).replace(**sizes)
    return q.presets.named(preset)(**sizes)


def recorded(out: Path) -> Settings:
    """The settings of the run in a folder. Raises: ValueError where there is none."""
    try:
        values = json.loads((out / "settings.json").read_bytes())
        return Settings(**(values | {"out": out, "resume": True}))
    except FileNotFoundError:
        raise ValueError(f"There is no run to resume in {out}: leave --resume out to start one.") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{out / 'settings.json'} is not a run's settings ({error}).") from error


def refuse_changes(kind: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"This run was started with the {kind} {name} = {before.get(name)!r}, now it is {now.get(name)!r}: "
                "resume with what it had, or start a new run in another --out."
            )


def comparable(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name not in FREE}
