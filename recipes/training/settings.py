"""The settings of a pretraining run, and the device, text and model that they select."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

import qwen3next as q
from layers.cpp import cpu
from recipes.training.data import Baseline, compression_baselines
from recipes.training.documents import plan_split, split_documents
from recipes.training.shards import Meta, build_shards, read_meta
from recipes.training.tokenizer import (
    byte_tokenizer,
    eos_id,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
    write_atomically,
)

MEASURED_STEPS = 20  # steps timed for the first plan of how many fit into `minutes`
# Settings that a resumed run may change, because they do not affect the losses.
FREE = {"out", "resume", "eval_every", "save_every", "device", "tensorboard", "recompute"}


@dataclass(frozen=True)
class Settings:
    """Train a Qwen3-Next model from scratch.

    Attributes:
        data: "stdlib" (the source of Python's standard library), a folder, a glob or a file.
        tokenizer: "bytes", "bpe:N" (trained on the training documents) or a tokenizer.json.
        preset: name of a preset in qwen3next.presets, or a config.json; the tokenizer sets the vocabulary size.
        steps: number of optimizer steps; default 1000 if `minutes` is not given.
        minutes: time for training and measuring, instead of a number of steps; the run does as many steps as fit.
        batch_size: windows in a micro-batch.
        window: tokens in a window.
        accumulate: micro-batches in a step.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        balance: "batch" balances the load of experts over all micro-batches of a step together, "micro" over each by
            itself, which saves a forward pass where there are several.
        mtp_depths: how many tokens the MTP layer drafts in its loss, one after another as in decoding.
        schedule: "wsd" keeps the peak and decays to zero over the last fifth; "cosine" decays to a tenth of the peak.
        weight_decay: weight decay of matrices and zero-centred norms.
        clip: largest gradient norm.
        seed: random seed of weights and data order.
        out: the run's folder.
        resume: continue the run in `out`; settings default to those of the run.
        eval_every: steps between validations on held-out text.
        save_every: steps between saved states.
        device: "auto", "cpu" or "cuda".
        precision: "fp32", "bf16" or "auto"; "auto" uses bf16 if the hardware multiplies in it, else fp32.
        recompute: parts of the model to compute again in the backward pass instead of keeping them, see
            `Qwen3Next.recompute`: less memory, the same losses.
        tensorboard: also write TensorBoard's event files.
    """

    data: str = "stdlib"
    tokenizer: str = "bpe:4096"
    preset: str = "tiny"
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 4
    window: int = 256
    accumulate: int = 1
    balance: Literal["batch", "micro"] = "batch"
    mtp_depths: int = 1
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
            "mtp_depths",
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
    """The device to use. Raises: ValueError for a device that does not exist here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here: choose cpu or auto.")
    return torch.device(name)


def pick_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """("fp32" or "bf16", reason). On a CPU without bf16 multiplication torch emulates it, slower than fp32.

    Raises: ValueError for "auto" if the environment variable QWEN3NEXT_PRECISION is set to an unknown value.
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
    """Tokenizer, shards and compressor figures in the run's folder; existing ones are reused."""
    out, shards = settings.out, settings.out / "data"
    tokenizer = _tokenizer(settings, out / "tokenizer")
    save_tokenizer(tokenizer, out / "tokenizer")
    if settings.resume and (shards / "meta.json").is_file() and (out / "baselines.json").is_file():
        return tokenizer, read_meta(shards)  # the saved text of the run, even if the source has changed
    meta = build_shards(settings.data, tokenizer, shards)
    baselines = [b._asdict() for b in compression_baselines(_texts(settings.data, "val"))]
    write_atomically(out / "baselines.json", (json.dumps(baselines, indent=1) + "\n").encode())
    return tokenizer, meta


def read_baselines(out: Path) -> list[Baseline]:
    """The compressed sizes of a run's held-out documents, in shard order."""
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
    # Only training documents are used: held-out text must not influence its own tokenisation.
    return train_bpe((text for _, text in _texts(settings.data, "train")), vocab_size=int(wanted[4:]))


def _texts(source: str, split: str) -> Iterator[tuple[str, str]]:
    return ((name, text) for side, name, text in split_documents(source, plan_split(source)) if side == split)


def model_config(preset: str, tokenizer: Tokenizer) -> q.ModelConfig:
    """The configuration of a preset or a config.json, with the tokenizer's vocabulary size.

    Raises: ValueError for a preset that does not exist.
    """
    sizes: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": eos_id(tokenizer)}
    if Path(preset).exists() and preset not in q.presets.ALL:
        return q.ModelConfig.load(preset).replace(**sizes)
    return q.presets.named(preset)(**sizes)


def recorded(out: Path) -> Settings:
    """The settings of the run in a folder. Raises: ValueError if there is no run."""
    try:
        values = json.loads((out / "settings.json").read_bytes())
        return Settings(**(values | {"out": out, "resume": True}))
    except FileNotFoundError:
        raise ValueError(f"There is no run to resume in {out}: leave --resume out to start one.") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{out / 'settings.json'} is not a run's settings ({error}): choose another --out.") from error


def refuse_changes(kind: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"This run was started with the {kind} {name} = {before.get(name)!r}, now it is {now.get(name)!r}: "
                "resume with the old value, or start a new run in another --out."
            )


def comparable(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name not in FREE}
