"""Fine-tune a model folder on conversations, all weights or LoRA, on the loop of `recipes.pretrain`.

    python -m recipes.finetune --init path/to/model --chats chats.jsonl --out runs/tuned
    python -m recipes.finetune --init path/to/model --chats chats.jsonl --out runs/lora --lora 16
    python -m recipes.finetune --out runs/lora --resume

A line of the file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}. The
model's own chat template renders it, and only what the assistant says is predicted. A killed run resumes exactly.
"""

import json
import math
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console

import qwen3next as q
from qwen3next.chat.template import ChatTemplate
from recipes.pretrain import Run, exit_status, loaded, start_or_resume
from recipes.training.chats import ChatWindows, read_conversations
from recipes.training.low_rank import add_low_rank, merge_low_rank, write_low_rank
from recipes.training.report import Live, Metrics, Row, read_metrics
from recipes.training.settings import Settings, comparable, pick_device, pick_precision, recorded, refuse_changes
from recipes.training.steps import Part
from recipes.training.tokenizer import load_tokenizer, write_atomically

COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "vocab.json")
USUAL = "self_attn|linear_attn|mlp.shared_expert|mlp.experts"


@dataclass(frozen=True)
class FinetuneSettings(Settings):
    """Fine-tune a model on conversations.

    Settings beside these are those of `recipes.pretrain`; `data`, `tokenizer`, `packing`, `fim` and `preset` are not
    used.

    Attributes:
        chats: a .jsonl file of conversations.
        validation_share: share of the conversations that are held out.
        lora: rank of LoRA; 0 trains all weights.
        lora_alpha: LoRA's products are scaled by lora_alpha / lora.
        targets: a regular expression of the weights that LoRA changes.
    """

    chats: str = ""
    validation_share: float = 0.05
    lora: int = 0
    lora_alpha: float = 32.0
    targets: str = USUAL
    lr: float = 2e-4
    warmup: int = 20
    steps: int | None = 200
    window: int = 1024
    weight_decay: float = 0.0
    schedule: Literal["wsd", "cosine"] = "cosine"
    out: Path = Path("runs/finetune")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora < 0 or not self.lora_alpha > 0 or not 0 < self.validation_share < 1:
            raise ValueError("lora must not be negative, lora_alpha above 0, and validation_share between 0 and 1.")
        if self.lora and self.optimizer == "muon":
            raise ValueError("Muon orthogonalises whole matrices, which LoRA's are not: choose --optimizer adamw.")
        if not self.resume and not (self.init and self.chats):
            raise ValueError("Give the model with --init and the conversations with --chats.")


def finetune(settings: FinetuneSettings, *, console: Console | None = None) -> Row:
    """Run or resume fine-tuning to the end; writes OUT/model, with `lora` also OUT/adapter, and result.json.

    Raises: as `recipes.pretrain.train`; ValueError for a model without a chat template.
    """
    console, out = Console() if console is None else console, settings.out
    if settings.resume:
        refuse_changes("setting", comparable(recorded(out, FinetuneSettings)), comparable(settings))
    elif (out / "settings.json").exists():
        raise ValueError(f"{out} already holds a run: add --resume to continue it, or choose another --out.")
    device = pick_device(settings.device)
    precision, why = pick_precision(settings.precision, device)
    template, tokenizer = ChatTemplate.load(settings.init), load_tokenizer(settings.init)
    how = {"window": settings.window, "validation_share": settings.validation_share, "seed": settings.seed}
    found = read_conversations(Path(settings.chats), template, tokenizer, **how)  # type: ignore[arg-type]

    torch.manual_seed(settings.seed)
    model = loaded(settings.init, settings.model).to(device)
    targets = settings.targets
    names = add_low_rank(model, rank=settings.lora, alpha=settings.lora_alpha, targets=targets) if settings.lora else []
    model.recompute(*settings.recompute)
    out.mkdir(parents=True, exist_ok=True)
    taught, average, state = start_or_resume(settings, model, found.fingerprint)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.print(
        f"{settings.init}: {trained / 1e6:.2f}M trained parameters on {device}, {precision} ({why}). "
        f"{len(found.train)} conversations to train on, {len(found.val)} held out; {found.cut} are cut at the window, "
        f"{found.silent} have nothing to train on, {found.unseen} answers are shown otherwise by the template.",
        highlight=False,
        soft_wrap=True,
    )
    windows = ChatWindows(found.train, window=settings.window, seed=settings.seed)
    held_out = ChatWindows(found.val, window=settings.window)
    look = partial(held_out_loss, windows=held_out, size=settings.batch_size, precision=precision)
    metrics = Metrics(out, step=state.step, tensorboard=settings.tensorboard, console=console, tracker=settings.tracker)
    try:
        with Live(console) as live:
            Run(settings, state, model, taught, windows, look, precision, metrics, live, 1.0, average).to_the_end()
    finally:
        metrics.close()
    result = {"step": state.step, "trained": trained, **look(model), "first": read_metrics(out)[0]["lm"]}
    if names:
        write_low_rank(model, names, out / "adapter")
        merge_low_rank(model, names)
    model.save_pretrained(out / "model")
    for name in COPIED:
        if (Path(settings.init) / name).is_file():
            shutil.copyfile(Path(settings.init) / name, out / "model" / name)
    write_atomically(out / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    console.print(
        f"{result['val_loss']:.3f} nats per held-out token of the assistant. The model is in {out / 'model'}"
        f"{', the adapter in ' + str(out / 'adapter') if names else ''}.",
        highlight=False,
        soft_wrap=True,
    )
    return result


@torch.no_grad()
def held_out_loss(model: q.Qwen3Next, windows: ChatWindows, *, size: int, precision: str) -> Row:
    """Mean loss of the assistant's tokens in the held-out conversations, each once."""
    total, targets, device = 0.0, 0, model.embed_tokens.weight.device
    for first in range(0, len(windows), size):
        part = Part.of(windows.batch(first, min(size, len(windows) - first)), device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            sums = model.loss_sums(part.input_ids, segments=part.segments, labels=part.labels)
        total, targets = total + sums.lm.item(), targets + sums.targets
    return {"val_loss": total / targets if targets else math.nan}


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def program() -> None:
        prog = "python -m recipes.finetune"
        given = sys.argv[1:] if args is None else args
        if "--resume" in given:
            out = tyro.cli(Out, args=args, prog=prog, return_unknown_args=True)[0].out
            settings = tyro.cli(FinetuneSettings, args=args, prog=prog, default=recorded(out, FinetuneSettings))
        else:
            settings = tyro.cli(FinetuneSettings, args=args, prog=prog)
        finetune(settings)

    return exit_status(program)


@dataclass(frozen=True)
class Out:
    """The folder of the run, which is read before all other settings when it is resumed."""

    out: Path = Path("runs/finetune")


if __name__ == "__main__":
    sys.exit(main())
