"""The settings of a pretraining run, and the device, text and model that they select."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tokenizers import Tokenizer

import qwen3next as q
from layers.cpp import cpu
from qwen3next.files.json_files import typed
from recipes.training.data import Baseline, compression_baselines
from recipes.training.documents import digest, plan_split, split_documents
from recipes.training.shards import Meta, build_shards, open_split, read_meta
from recipes.training.sources import Source, parse_sources
from recipes.training.tokenizer import (
    FIM,
    byte_tokenizer,
    document_decoder,
    eos_id,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
    write_atomically,
)

MEASURED_STEPS = 20  # steps timed for the first plan of how many fit into `minutes`
# Settings that a resumed run may change, because they do not affect the losses.
FREE = {
    "out",
    "resume",
    "eval_every",
    "save_every",
    "device",
    "tensorboard",
    "tracker",
    "recompute",
    "needles",
    "samples",
}
# What runs did before a setting was there, where its default now is another.
BEFORE: dict[str, Any] = {"balance": "micro"}


@dataclass(frozen=True)
class Settings:
    """Train a Qwen3-Next model from scratch.

    Attributes:
        data: sources, each as SOURCE, NAME=SOURCE or NAME=SOURCE@WEIGHT (recipes/training/sources.py): "stdlib" (the
            source of Python's standard library), a folder, a glob, a file, "hf:NAME" (a dataset of Hugging Face), or a
            folder that `python -m recipes.data` wrote.
        tokenizer: "bytes", "bpe:N" (trained on the training documents) or a tokenizer.json.
        preset: "tiny", "small", "nano-60m" or "base-350m-a100m", which also set what a run of that size needs
            (recipes/training/presets.py); or any name in qwen3next.presets, or a config.json. The tokenizer sets the
            vocabulary size.
        model: changes of the configuration's fields, as `hidden_size=256 layer_types=[...]`; values are JSON.
        init: a model folder to start from instead of random weights; then `preset` is not used.
        packing: "cut" cuts the stream of documents into windows; "best_fit" fills windows with whole documents, and
            cuts only those longer than a window.
        fim: share of documents that are trained on as fill-in-the-middle.
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
        optimizer: "adamw", or "muon" for matrices and experts, with AdamW for the rest.
        ema: decay of an exponential moving average of the weights, saved as OUT/model-ema; 0 keeps none.
        skip_spikes: skip a step whose loss or gradient norm lies more than so many standard deviations above the last
            128; 0 skips none.
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
        tracker: "wandb" or "trackio", which must be installed, or "none".
        needles: lengths in tokens at which recall of a fact is measured at each validation.
        samples: how many held-out documents the model continues at the end of the run, in OUT/samples.md.
    """

    data: tuple[str, ...] = ("stdlib",)
    tokenizer: str = "bpe:4096"
    packing: Literal["cut", "best_fit"] = "cut"
    fim: float = 0.0
    preset: str = "tiny"
    model: tuple[str, ...] = ()
    init: str = ""
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
    optimizer: Literal["adamw", "muon"] = "adamw"
    ema: float = 0.0
    skip_spikes: float = 0.0
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
    tracker: Literal["none", "wandb", "trackio"] = "none"
    needles: tuple[int, ...] = ()
    samples: int = 0

    def __post_init__(self) -> None:
        for name in ("recompute", "model", "needles"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives a list
        object.__setattr__(self, "data", (self.data,) if isinstance(self.data, str) else tuple(self.data))
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
        if self.warmup < 0 or self.weight_decay < 0 or self.skip_spikes < 0 or self.samples < 0:
            raise ValueError("warmup, weight_decay, skip_spikes and samples must not be negative.")
        if not 0 <= self.ema < 1 or not 0 <= self.fim <= 1:
            raise ValueError(
                f"ema is {self.ema} and fim {self.fim}: choose ema from 0 to below 1, and fim from 0 to 1."
            )
        if self.tracker != "none" and find_spec(self.tracker) is None:
            raise ValueError(f"{self.tracker} is not installed: pip install {self.tracker}, or --tracker none.")
        if not self.data:
            raise ValueError("No source of text is given: name one or more after --data.")


Kind = TypeVar("Kind", bound=Settings)


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


@dataclass(frozen=True)
class Prepared:
    """The text of a run: its tokenizer, and for each source a folder of shards with what it holds."""

    tokenizer: Tokenizer
    sources: list[Source]
    folders: list[Path]
    metas: list[Meta]

    @property
    def fingerprint(self) -> str:
        """Of all text with its tokens and weights."""
        if len(self.metas) == 1:
            return self.metas[0].fingerprint
        about = [(s.name, s.weight, meta.fingerprint) for s, meta in zip(self.sources, self.metas, strict=True)]
        return digest(json.dumps(about))

    def tokens(self, split: str) -> int:
        return sum(meta.tokens[split] for meta in self.metas)


def prepare_data(settings: Settings) -> Prepared:
    """Tokenizer, shards of every source and compressor figures in the run's folder; existing ones are reused.

    Raises: ValueError for sources that cannot be read, or prepared ones of different tokenizers.
    """
    out, sources = settings.out, parse_sources(settings.data)
    tokenizer = _tokenizer(settings, sources, out / "tokenizer")
    save_tokenizer(tokenizer, out / "tokenizer")
    folders, metas = [], []
    for source in sources:
        shards = out / "data" if len(sources) == 1 else out / "data" / source.name
        if is_prepared(source.place):
            shards = Path(source.place)
            if load_tokenizer(shards).to_str() != tokenizer.to_str():
                raise ValueError(
                    f"{shards} was tokenized with another tokenizer than this run's: prepare it again with "
                    f"`python -m recipes.data --tokenizer {out / 'tokenizer'}`."
                )
            metas.append(read_meta(shards))
        elif settings.resume and (shards / "meta.json").is_file() and (out / "baselines.json").is_file():
            metas.append(read_meta(shards))  # the saved text of the run, even if the source has changed
        else:
            metas.append(build_shards(source.place, tokenizer, shards))
        folders.append(shards)
    prepared = Prepared(tokenizer, sources, folders, metas)
    if not (settings.resume and (out / "baselines.json").is_file()):
        baselines = [b._asdict() for b in compression_baselines(_held_out_texts(prepared))]
        write_atomically(out / "baselines.json", (json.dumps(baselines, indent=1) + "\n").encode())
    return prepared


def is_prepared(place: str) -> bool:
    """Whether a source is a folder that `python -m recipes.data` wrote."""
    return (Path(place) / "meta.json").is_file() and (Path(place) / "tokenizer.json").is_file()


def _held_out_texts(prepared: Prepared) -> Iterator[tuple[str, str]]:
    """Name and text of every held-out document, source by source; the texts are those of their tokens."""
    decode = document_decoder(prepared.tokenizer)
    for source, folder, meta in zip(prepared.sources, prepared.folders, prepared.metas, strict=True):
        tokens, starts = open_split(folder, "val")
        prefix = "" if len(prepared.sources) == 1 else f"{source.name}: "
        for name, begin, end in zip(meta.val_names, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            yield f"{prefix}{name}", decode([tokens[begin : end - 1]])[0]


def read_baselines(out: Path) -> list[Baseline]:
    """The compressed sizes of a run's held-out documents, source by source in shard order."""
    return [Baseline(**values) for values in json.loads((out / "baselines.json").read_bytes())]


def _tokenizer(settings: Settings, sources: list[Source], folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    prepared = [source.place for source in sources if is_prepared(source.place)]
    if prepared or settings.init:
        return load_tokenizer(prepared[0] if prepared else settings.init)
    return named_tokenizer(settings.tokenizer, [source.place for source in sources], fim=settings.fim > 0)


def named_tokenizer(wanted: str, places: Sequence[str], *, fim: bool = False) -> Tokenizer:
    """The tokenizer of `--tokenizer`, learned from the training documents of these sources if it is "bpe:N".

    Args:
        fim: add the three marks of fill-in-the-middle, where the tokenizer lacks them.
    """
    if wanted == "bytes":
        tokenizer = byte_tokenizer()
    elif not wanted.startswith("bpe:"):
        tokenizer = load_tokenizer(wanted)
    elif not wanted[4:].isdecimal():
        raise ValueError(f'tokenizer is {wanted!r}: give "bytes", "bpe:4096" or a tokenizer.json.')
    else:  # Only training documents are used: held-out text must not influence its own tokenisation.
        texts = (text for place in places for _, text in _texts(place, "train"))
        tokenizer = train_bpe(texts, vocab_size=int(wanted[4:]))
    if fim:
        tokenizer.add_special_tokens([mark for mark in FIM if tokenizer.token_to_id(mark) is None])
    return tokenizer


def fim_marks(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Ids of the marks of fill-in-the-middle. Raises: ValueError if the tokenizer lacks one."""
    found = [tokenizer.token_to_id(mark) for mark in FIM]
    ids = [x for x in found if x is not None]
    if len(ids) < len(FIM):
        raise ValueError(f"The tokenizer lacks {FIM[found.index(None)]}, which fill-in-the-middle needs: use --fim 0.")
    return ids[0], ids[1], ids[2]


def _texts(source: str, split: str) -> Iterator[tuple[str, str]]:
    return ((name, text) for side, name, text in split_documents(source, plan_split(source)) if side == split)


def model_config(settings: Settings, tokenizer: Tokenizer) -> q.ModelConfig:
    """The configuration of a preset or a config.json, with the tokenizer's vocabulary size and `settings.model`.

    Raises: ValueError for a preset or a field that does not exist, or a value that is not JSON.
    """
    preset = settings.preset
    sizes: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": eos_id(tokenizer)}
    if Path(preset).exists() and preset not in q.presets.ALL:
        config = q.ModelConfig.load(preset).replace(**sizes)
    else:
        config = q.presets.named(preset.replace("-", "_"))(**sizes)
    return config.replace(**model_changes(settings.model))


def model_changes(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` pairs as fields of a configuration. Raises: ValueError for another form or an unknown field."""
    known, found = {f.name: f.type for f in fields(q.ModelConfig)}, {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--model {pair!r} is no field of the configuration with a value: write hidden_size=256.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text  # a plain word, such as attention_gate=none
        found[name] = typed(name, known[name], value)
    return found


def recorded(out: Path, kind: type[Kind] = Settings) -> Kind:  # type: ignore[assignment]
    """The settings of the run in a folder, of that kind. Raises: ValueError if there is no such run."""
    try:
        values = json.loads((out / "settings.json").read_bytes())
        return kind(**(BEFORE | values | {"out": out, "resume": True}))
    except FileNotFoundError:
        raise ValueError(f"There is no run to resume in {out}: leave --resume out to start one.") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{out / 'settings.json'} is not a run's settings ({error}): choose another --out.") from error


def refuse_changes(kind: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises: ValueError that names what differs between a run and what is asked of it now."""
    if kind == "setting":  # a run of an earlier release did not have all of them
        before = json.loads(json.dumps(comparable(Settings()) | BEFORE)) | before
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"This run was started with the {kind} {name} = {before.get(name)!r}, now it is {now.get(name)!r}: "
                "resume with the old value, or start a new run in another --out."
            )


def comparable(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name not in FREE}
