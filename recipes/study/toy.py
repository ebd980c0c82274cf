"""Bigram-backcopy: a small task in which attention sinks and small values at the sink form within a minute.

A fixed Markov chain samples each token from the one before it; after a trigger, the token before the trigger is copied.
So attention is needed only after triggers, and elsewhere a head can attend to a sink.
Source: arXiv:2410.13835; sizes here are smaller.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

import qwen3next as q
from recipes.study.metrics import measure
from recipes.training.data import Batch
from recipes.training.report import Row

VOCABULARY, TRIGGERS = 64, 3  # ids 0 to 2 are triggers; 64 starts each sequence
BOS = VOCABULARY
TRIGGER_SHARE = 0.1  # share of the sampled tokens
HELD_OUT = 10**9  # samples from this number on are never used for training


def transitions() -> NDArray[np.float64]:
    """P(next | token), (64, 64): sampled once for all runs, sparse like text; rows of triggers are not used."""
    drawn = np.random.default_rng(0).dirichlet(np.full(VOCABULARY, 0.2), size=VOCABULARY)
    drawn[:, :TRIGGERS] = TRIGGER_SHARE / TRIGGERS
    rest = drawn[:, TRIGGERS:]
    drawn[:, TRIGGERS:] = rest / rest.sum(1, keepdims=True) * (1 - TRIGGER_SHARE)
    return drawn


@dataclass(frozen=True)
class BigramBackcopy:
    """Sequences as a pure function of their number and `seed`.

    A token after a trigger is always a copy, so a trigger never follows a trigger.
    """

    window: int
    seed: int
    p: NDArray[np.float64] = field(default_factory=transitions)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the chain and the length."""
        return hashlib.sha256(self.p.tobytes() + str(self.window).encode()).hexdigest()

    def batch(self, first_sample: int, batch_size: int) -> Batch:
        """Sequences first_sample to first_sample + batch_size − 1, (b, window), each one sequence."""
        drawn = np.stack([self._drawn(i) for i in range(first_sample, first_sample + batch_size)])
        below = self.p.cumsum(1)
        below[:, -1] = 1.0  # rounding could otherwise leave a sample without a token
        ids = np.full((batch_size, self.window), BOS)
        ids[:, 1:2] = TRIGGERS + (drawn[:, 1:2] * (VOCABULARY - TRIGGERS)).astype(int)
        for t in range(2, self.window):
            fresh = (below[ids[:, t - 1]] <= drawn[:, t : t + 1]).sum(1)
            ids[:, t] = np.where(ids[:, t - 1] < TRIGGERS, ids[:, t - 2], fresh)
        return Batch(torch.from_numpy(ids), torch.zeros(ids.shape, dtype=torch.long))

    def _drawn(self, sample: int) -> NDArray[np.float64]:
        return np.random.default_rng([self.seed, sample]).random(self.window)

    def floor(self, ids: Tensor) -> float:
        """Mean entropy of the sampled tokens in these sequences, in nats: the least possible loss for them."""
        entropy = -(self.p * np.log(np.maximum(self.p, 1e-300))).sum(1)
        before = ids[:, 1:-1].numpy()
        return float(entropy[before[before >= TRIGGERS]].mean())


@dataclass
class ToyLook:
    """The measures of a model on held-out sequences."""

    task: BigramBackcopy
    sequences: int = 128

    def __call__(self, model: q.Qwen3Next) -> Row:
        """`copy_nats`: loss after triggers; `bigram_nats`: loss elsewhere minus the chain's entropy; and `measure`."""
        ids = self.task.batch(HELD_OUT, self.sequences).input_ids
        model.eval()
        with torch.no_grad():
            logits = model(ids.to(model.embed_tokens.weight.device)).logits.cpu()
        nats = F.cross_entropy(logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten(), reduction="none")
        nats, copied = nats.view(len(ids), -1), after_trigger(ids)[:, 1:-1]
        row: Row = {
            "copy_nats": nats[copied].mean().item(),
            "bigram_nats": nats[~copied].mean().item() - self.task.floor(ids),
        }
        return row | measure(model, [ids], queries=queries)


def after_trigger(ids: Tensor) -> Tensor:
    """Mask of the triggers, after which the next token is a copy."""
    return ids < TRIGGERS


def queries(ids: Tensor) -> dict[str, Tensor]:
    """Masks of the tokens at which a copying head is needed, and of the others."""
    return {"active": after_trigger(ids), "dormant": ~after_trigger(ids)}
