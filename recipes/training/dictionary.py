"""A sparse autoencoder, which writes activations as sparse sums of features: training, and measures on held-out rows.

Shapes: n rows, width, f features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qwen3next.interp import ActivationRows

DEAD_AFTER = 100  # steps without firing
AUXILIARY = 1 / 32  # weight of the auxiliary loss of dead features, as in the source


class SparseAutoencoder(nn.Module):
    """codes = relu(W_e (x − b) + b_e), only the k largest if `k` > 0; x̂ = W_d codes + b, with unit rows of W_d.

    Inputs are scaled by a constant, so that their mean square around the mean is 1.
    Source: arXiv:2406.04093, sections 2.3 (TopK) and A.2 (the auxiliary loss: dead features model the residual).
    """

    scale: Tensor

    def __init__(self, width: int, features: int, *, k: int):
        super().__init__()
        directions = torch.nn.functional.normalize(torch.randn(features, width), dim=-1)
        self.k = k
        self.decoder = nn.Parameter(directions)
        self.encoder = nn.Parameter(directions.T.contiguous())
        self.encoder_bias, self.bias = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def start_from(self, x: Float[Tensor, "n width"]) -> None:
        """Set scale and bias from the first rows (n, width)."""
        mean = x.mean(0)
        self.scale.copy_((x - mean).square().mean().rsqrt())
        self.bias.copy_(mean * self.scale)

    def activations(self, x: Float[Tensor, "n width"]) -> Float[Tensor, "n f"]:
        """Codes before the k largest are selected, (n, f)."""
        return ((x * self.scale - self.bias) @ self.encoder + self.encoder_bias).relu()

    def encode(self, x: Float[Tensor, "n width"]) -> Float[Tensor, "n f"]:
        """Sparse codes (n, f)."""
        codes = self.activations(x)
        return largest(codes, self.k) if self.k else codes

    def decode(self, codes: Float[Tensor, "n f"]) -> Float[Tensor, "n width"]:
        """The reconstruction (n, width), in the scale of the model."""
        return (codes @ self.decoder + self.bias) / self.scale


def largest(codes: Tensor, k: int) -> Tensor:
    """The k largest entries of each row, with zeros elsewhere."""
    best = codes.topk(min(k, codes.shape[-1]))
    return torch.zeros_like(codes).scatter(-1, best.indices, best.values)


@dataclass(frozen=True)
class Step:
    """Metrics of one step: share of the batch's variance explained, codes per row, share of dead features."""

    step: int
    explained: float
    l0: float
    dead: float


def fit(
    sae: SparseAutoencoder, rows: ActivationRows, name: str, *, steps: int, batch: int, lr: float, l1: float, seed: int
) -> Iterator[Step]:
    """Train on the rows of a column in random order for several epochs; yields the metrics of every step.

    Args:
        l1: weight of the L1 penalty on codes, used if `sae.k` is 0.
    """
    optimiser = torch.optim.Adam(sae.parameters(), lr=lr)
    silent = torch.zeros(sae.decoder.shape[0], dtype=torch.long)
    batches: Iterator[dict[str, Tensor]] = iter(())
    epoch = 0
    for step in range(1, steps + 1):
        if (values := next(batches, None)) is None:
            batches, epoch = rows.batches(batch, [name], seed=seed + epoch), epoch + 1
            values = next(batches)
        x = values[name].flatten(1).float()
        if step == 1:
            sae.start_from(x)
        target, raw = x * sae.scale, sae.activations(x)
        codes = largest(raw, sae.k) if sae.k else raw
        left = target - codes @ sae.decoder - sae.bias
        variance = (target - target.mean(0)).square().sum(-1).mean()
        loss = left.square().sum(-1).mean() / variance + l1 * codes.sum(-1).mean()
        silent = torch.where(codes.detach().any(0), 0, silent + 1)
        dead = silent > DEAD_AFTER
        if sae.k and bool(dead.any()):
            helpers = largest(raw * dead, 2 * sae.k) @ sae.decoder
            loss = loss + AUXILIARY * (left.detach() - helpers).square().sum(-1).mean() / variance
        for group in optimiser.param_groups:  # linear decay to zero over the last fifth
            group["lr"] = lr * min(1.0, 5 * (1 - (step - 1) / steps))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            sae.decoder.copy_(torch.nn.functional.normalize(sae.decoder, dim=-1))
        explained = 1 - float(left.detach().square().sum(-1).mean() / variance)
        yield Step(step, explained, float((codes > 0).sum(-1).float().mean()), float(dead.float().mean()))


@dataclass(frozen=True)
class Scores:
    """Measures on held-out rows.

    Attributes:
        explained: share of variance explained.
        l0: mean number of nonzero codes per row.
        density: (f,) share of rows on which each feature fires; 0 for dead ones.
        best, rows: (f, top) largest codes of each feature, and their rows.
    """

    explained: float
    l0: float
    density: Tensor
    best: Tensor
    rows: Tensor


@torch.no_grad()
def measure(sae: SparseAutoencoder, rows: ActivationRows, name: str, *, top: int = 8) -> Scores:
    """Variance explained, and density and rows with the largest codes of each feature, in one pass."""
    f, width = sae.decoder.shape
    error, fired, done = 0.0, torch.zeros(f), 0
    total, square = torch.zeros(width, dtype=torch.float64), 0.0
    best, where = torch.zeros(f, top), torch.zeros(f, top, dtype=torch.long)
    for values in rows.batches(1024, [name]):
        x = values[name].flatten(1).float()
        codes = sae.encode(x)
        error += float((x - sae.decode(codes)).square().sum())
        total, square = total + x.double().sum(0), square + float(x.double().square().sum())
        fired += (codes > 0).sum(0)
        here = torch.arange(done, done + len(x)).expand(f, -1)
        merged, ids = torch.cat((best, codes.T), dim=1), torch.cat((where, here), dim=1)
        best, chosen = merged.topk(top)
        where, done = ids.gather(1, chosen), done + len(x)
    variance = square - float(total.square().sum()) / done
    return Scores(1 - error / variance, float(fired.sum()) / done, fired / done, best, where)


def principal_components(rows: ActivationRows, name: str, held_out: ActivationRows, count: int) -> float:
    """Share of the held-out variance explained by the first `count` principal components of `rows`, as a baseline."""
    moments = []
    for part in (rows, held_out):
        n, total, products = 0, torch.zeros(()), torch.zeros(())
        for values in part.batches(4096, [name]):
            x = values[name].flatten(1).double()
            n, total, products = n + len(x), total + x.sum(0), products + x.T @ x
        moments.append(products / n - torch.outer(total / n, total / n))
    directions = torch.linalg.eigh(moments[0]).eigenvectors[:, -count:]
    return float((directions.T @ moments[1] @ directions).trace() / moments[1].trace())
