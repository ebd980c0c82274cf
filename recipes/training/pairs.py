"""Recall of key-value pairs: sequences to train on, and the share of values that a model recalls."""

import numpy as np
import torch

import qwen3next as q
from recipes.training.data import LabelledBatch
from recipes.training.report import Row
from recipes.training.steps import Part

KINDS = 32  # keys, and values
HELD_OUT = 10**9  # sequences from this number on are never trained on


class Pairs:
    """Multi-query associative recall: pairs of a key and a value, then three times every key, in another order.

    An eighth of the window's tokens are keys. Keys are tokens 1 to 32, values 33 to 64; values behind a key's later
    appearances are to be predicted. Sequences are a pure function of their number. Source: arXiv:2312.04927.
    """

    def __init__(self, window: int, seed: int) -> None:
        self.pairs, self.window, self.seed = window // 8, window, seed

    def batch(self, first_sample: int, batch_size: int) -> LabelledBatch:
        """Sequences first_sample to first_sample + batch_size - 1, (b, window)."""
        ids = np.zeros((batch_size, self.window), dtype=np.int64)
        n = self.pairs
        for row in range(batch_size):
            generator = np.random.default_rng([self.seed, first_sample + row])
            keys, values = generator.permutation(KINDS)[:n] + 1, generator.integers(KINDS + 1, 2 * KINDS + 1, n)
            order = np.concatenate([np.arange(n), *(generator.permutation(n) for _ in range(3))])
            ids[row, : 8 * n : 2], ids[row, 1 : 8 * n : 2] = keys[order], values[order]
        labels = np.full_like(ids, -100)
        labels[:, 2 * n + 1 : 8 * n : 2] = ids[:, 2 * n + 1 : 8 * n : 2]
        return LabelledBatch(torch.from_numpy(ids), torch.zeros(ids.shape, dtype=torch.long), torch.from_numpy(labels))


@torch.no_grad()
def recalled(model: q.Qwen3Next, windows: Pairs, *, sequences: int = 64) -> Row:
    """Share of the values that are the most likely token, in sequences that were never trained on."""
    part = Part.of(windows.batch(HELD_OUT, sequences), model.embed_tokens.weight.device)
    assert part.labels is not None
    guess = model(part.input_ids).logits[:, :-1].argmax(-1)
    place = part.labels[:, 1:] != -100
    return {"recall": float((guess == part.labels[:, 1:])[place].float().mean())}
