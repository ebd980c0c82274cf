"""Text for the study's language models: each window starts with the same token and is one sequence.

Shards, order and split are those of pretraining (recipes/training/shards.py, recipes/training/data.py). Documents
within a window are not separated, as in the study, which measures sinks on a window's first token.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

import qwen3next as q
from recipes.study.metrics import measure
from recipes.training.data import Batch, PackedWindows
from recipes.training.documents import plan_split, split_documents
from recipes.training.report import Row
from recipes.training.shards import Meta, build_shards, open_split, read_meta
from recipes.training.tokenizer import byte_tokenizer, load_tokenizer, save_tokenizer, train_bpe

BOS = "<|startoftext|>"


def prepare_text(source: str, wanted: str, folder: Path) -> tuple[Tokenizer, Meta]:
    """Tokenizer and shards in `folder`, built once and reused by later calls.

    Args:
        source: text source, as in `documents`.
        wanted: "bytes", "bpe:N" trained on the training documents, or a tokenizer.json.
    """
    if (folder / "tokenizer" / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder / "tokenizer")
    else:
        if wanted == "bytes":
            tokenizer = byte_tokenizer()
        elif wanted.startswith("bpe:") and wanted[4:].isdecimal():
            texts = (t for side, _, t in split_documents(source, plan_split(source)) if side == "train")
            tokenizer = train_bpe(texts, vocab_size=int(wanted[4:]))
        else:
            tokenizer = load_tokenizer(wanted)
        tokenizer.add_special_tokens([BOS])
        save_tokenizer(tokenizer, folder / "tokenizer")
    return tokenizer, build_shards(source, tokenizer, folder / "data")


def bos_id(tokenizer: Tokenizer) -> int:
    """The id of the token that starts windows. Raises: ValueError for a tokenizer without it."""
    found = tokenizer.token_to_id(BOS)
    if found is None:
        raise ValueError(f"The tokenizer lacks {BOS}, which begins every window: add it with prepare_text.")
    return found


def with_first(ids: Tensor, first: int) -> Tensor:
    """Rows of ids with the token `first` prepended."""
    return torch.cat((torch.full((len(ids), 1), first), ids), dim=1)


class BosWindows:
    """`PackedWindows` of window − 1 tokens after BOS; also a pure function of the number of samples seen."""

    def __init__(self, folder: Path, split: str, *, window: int, seed: int, bos: int) -> None:
        self.windows, self.bos = PackedWindows(folder, split, window=window - 1, seed=seed), bos

    def batch(self, first_sample: int, batch_size: int) -> Batch:
        """Samples first_sample to first_sample + batch_size − 1."""
        ids = with_first(self.windows.batch(first_sample, batch_size).input_ids, self.bos)
        return Batch(ids, torch.zeros_like(ids))


@dataclass
class HeldOut:
    """The held-out text cut into windows, each after BOS, so that every token is predicted once.

    Attributes:
        looks: windows measured during training, sampled once and equal for all arms and seeds.
        rows: rows of a batch.
    """

    folder: Path
    window: int
    bos: int
    looks: int = 64
    rows: int = 16

    @cached_property
    def windows(self) -> Tensor:
        """All windows (n, window), without an incomplete last one."""
        tokens, _ = open_split(self.folder, "val")
        size = self.window - 1
        if len(tokens) < size:
            raise ValueError(f"The held-out text has {len(tokens)} tokens and a window {self.window}: give more text.")
        cut = torch.from_numpy(tokens[: len(tokens) // size * size].astype(np.int64)).view(-1, size)
        return with_first(cut, self.bos)

    @cached_property
    def some(self) -> Tensor:
        """The windows that are measured during training."""
        order = np.random.default_rng(0).permutation(len(self.windows))[: self.looks]
        return self.windows[torch.from_numpy(np.sort(order))]

    @torch.no_grad()
    def nats(self, model: q.Qwen3Next, windows: Tensor) -> float:
        """Mean loss of a token, in nats."""
        total, device = 0.0, model.embed_tokens.weight.device
        for ids in windows.split(self.rows):
            ids = ids.to(device)
            logits = model(ids).logits[:, :-1].float()
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        return total / (windows.shape[0] * (windows.shape[1] - 1))

    def bits_per_byte(self, nats: float) -> float:
        """Converts mean nats per token to bits per byte, with the bytes per token of the held-out text."""
        meta = read_meta(self.folder)
        return nats / math.log(2) * meta.tokens["val"] / meta.utf8_bytes["val"]

    def __call__(self, model: q.Qwen3Next) -> Row:
        """The measures during training."""
        model.eval()
        nats = self.nats(model, self.some)
        row: Row = {"val_nats": nats, "val_bits_per_byte": self.bits_per_byte(nats)}
        return row | measure(model, self.some.split(self.rows))
