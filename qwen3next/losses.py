"""Training losses: sums of one call, and the means of the batch that the call is a part of.

A large batch is often computed in parts: micro-batches one after another, or one part on each rank. Its losses are sums
over all tokens divided by counts of all tokens. So a call gives sums (`LossSums`) and what must be known of the other
parts is a few counts (`Counts`), which have no gradients and add up:

    counts = sum_of(model.loss_counts(part) for part in parts)  # or an all-reduce of counts.vector()
    for part in parts:
        model.loss_sums(part).losses(model.config, counts).total.backward()

The losses and gradients of the parts add up to those of the whole batch, the balance loss included: it is linear in the
parts' probabilities once the choices of the whole batch are known. arXiv:2501.11873 explains why the whole batch should
be balanced and not each part of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layers.moe import RouterStats
from layers.segments import Segments
from qwen3next.config import ModelConfig
from qwen3next.inputs import as_ids, check_labels, check_segments
from qwen3next.mtp_depths import drafted_states


@dataclass
class Losses:
    """Means over `targets` predicted tokens, in nats; `total` weighs them by the config's coefficients.

    `mtp` is over the tokens two ahead, with several depths the mean of their losses; `logit_z` is the mean of
    logsumexp(logits)²; `balance` and `z` are means over the sparse layers, the MTP layer included. `load` is the share
    of choices by expert in each sparse layer (layers, e), of the whole batch. Losses that a model lacks are zero.
    """

    total: Tensor
    lm: Tensor
    mtp: Tensor
    balance: Tensor
    z: Tensor
    load: Tensor | None
    targets: int
    logit_z: Tensor


@dataclass
class Counts:
    """What the sums of a batch are divided by, without gradients.

    Attributes:
        targets: (1 + depths,) predicted tokens: one ahead, two ahead, … int64.
        choices: (layers, e) how often each expert was chosen; (0, 0) in a dense model. float64, which is exact.
        tokens: (layers,) routed tokens. float64.
    """

    targets: Tensor
    choices: Tensor
    tokens: Tensor

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.targets + other.targets, self.choices + other.choices, self.tokens + other.tokens)

    def vector(self) -> Tensor:
        """All counts in one float64 vector, for one all-reduce."""
        return torch.cat((self.targets.double(), self.choices.flatten(), self.tokens))

    def like(self, vector: Tensor) -> "Counts":
        """The counts in a vector that `vector` made of some of the same shapes."""
        parts = vector.split((len(self.targets), self.choices.numel(), len(self.tokens)))
        return Counts(parts[0].long(), parts[1].view_as(self.choices), parts[2])


def sum_of(counts: Iterable[Counts]) -> Counts:
    """The counts of a batch from those of its parts. Raises: ValueError for no parts."""
    total = None
    for some in counts:
        total = some if total is None else total + some
    if total is None:
        raise ValueError("There are no parts whose counts could be added: give at least one.")
    return total


@dataclass
class LossSums:
    """The losses of one call as sums.

    Attributes:
        lm: Σ −ln p of the next tokens, plus logit_z by its coefficient: the logits' gradients are made together.
        logit_z: Σ logsumexp(logits)² over the same places, without gradient; zero if its coefficient is.
        mtp: Σ −ln p of the tokens two ahead, three ahead, …; empty without an MTP loss.
        router: of the sparse layers, stacked; None in a dense model. The MTP layer's is over all depths.
        counts: of this call alone.
        targets: how many next tokens.
    """

    lm: Tensor
    logit_z: Tensor
    mtp: list[Tensor]
    router: RouterStats | None
    counts: Counts
    targets: int

    def losses(self, config: ModelConfig, counts: Counts | None = None) -> Losses:
        """This call's share of the losses of a batch; None: the call is the whole batch."""
        counts, zero = self.counts if counts is None else counts, self.lm.new_zeros(())
        targets, load = counts.targets.clamp(min=1), None
        mtp, balance, z = zero, zero, zero
        total, logit_z = self.lm / targets[0], self.logit_z / targets[0]
        lm = total - config.logit_z_loss_coef * logit_z if config.logit_z_loss_coef else total
        if self.mtp:
            # Means of each depth by themselves: at a greater depth fewer tokens have a target.
            mtp = sum((x / n for x, n in zip(self.mtp, targets[1:], strict=True)), zero) / len(self.mtp)
            total = total + config.mtp_loss_coef * mtp
        if self.router is not None:
            tokens = counts.tokens.clamp(min=1).to(self.router.probabilities.dtype)
            choices = counts.choices.to(tokens.dtype)
            load = (choices / choices.sum(-1, keepdim=True).clamp(min=1)).detach()
            chosen, probability = choices / tokens[:, None], self.router.probabilities / tokens[:, None]
            balance = (choices.shape[-1] * (chosen * probability).sum(-1)).mean()
            z = (self.router.squared_logsumexp / tokens).mean()
            total = total + config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
        return Losses(total, lm, mtp, balance, z, load, self.targets, logit_z)


def loss_sums(
    model: Any,
    input_ids: Tensor,
    *,
    segments: Segments | None = None,
    labels: Tensor | None = None,
    mtp_depths: int = 1,
) -> LossSums:
    """The losses of `model.loss` as sums. Arguments are the same."""
    states, labels, segments, router = _states(model, input_ids, segments, labels, mtp_depths)
    hooks = [model.hook_logits, *(model.mtp.hook_logits for _ in states[1:])]
    losses, squares, targets, counts = [], [], [], []
    for ahead, (hidden, hook) in enumerate(zip(states, hooks, strict=True), start=1):
        place = _has_target(labels, segments, ahead)
        target = labels.roll(-ahead, dims=1)[place]
        z_loss = model.config.logit_z_loss_coef if ahead == 1 else 0.0
        loss, squared = model._summed_cross_entropy(hidden, place, target, segments, hook, z_loss)
        losses.append(loss)
        squares.append(squared)
        targets.append(len(target))
        counts.append(place.sum())
    return LossSums(losses[0], squares[0], losses[1:], router, _counts(counts, router), targets[0])


def loss_counts(
    model: Any,
    input_ids: Tensor,
    *,
    segments: Segments | None = None,
    labels: Tensor | None = None,
    mtp_depths: int = 1,
) -> Counts:
    """The counts of `loss_sums` alone: a forward pass without the head.

    Gradients stay enabled where they are, so that the same kernels run and the same experts are chosen.
    """
    states, labels, segments, router = _states(model, input_ids, segments, labels, mtp_depths)
    counts = [_has_target(labels, segments, ahead).sum() for ahead in range(1, len(states) + 1)]
    return _counts(counts, router)


def _states(
    model: Any, input_ids: Tensor, segments: Segments | None, labels: Tensor | None, mtp_depths: int
) -> tuple[list[Tensor], Tensor, Segments, RouterStats | None]:
    """Hidden states for the tokens one ahead, two ahead, …; labels, segments; statistics of all routers."""
    labels = input_ids if labels is None else labels
    check_labels(input_ids, labels, model.vocab_size)
    input_ids, labels = as_ids(input_ids), as_ids(labels)
    if segments is not None and segments.gapped:
        check_segments(input_ids, segments, cached=False)
        labels = segments.closed(labels)[0]
        input_ids, segments = segments.closed(input_ids)
    hidden, aux, segments = model.hidden_states(input_ids, segments, None, stats=True)
    states = [hidden]
    if model.mtp is not None and model.config.mtp_loss_coef:
        if mtp_depths == 1:  # the layer as it is, which takes the faster paths
            rope = model._rotation(segments.positions, hidden.dtype)
            drafted, of_mtp = model.mtp(hidden, model.embed_tokens(input_ids.roll(-1, dims=1)), rope, segments)
            states, aux = [hidden, drafted], aux + of_mtp
        else:
            more, of_mtp = drafted_states(model, hidden, input_ids, segments, mtp_depths)
            states, aux = [hidden, *more], aux + of_mtp
    return states, labels, segments, stacked(aux)


def _has_target(labels: Tensor, segments: Segments, ahead: int) -> Tensor:
    """(b, t) True where the token `ahead` is of the same sequence and labelled."""
    return segments.next_is_same(ahead) & (labels.roll(-ahead, dims=1) != -100)


def stacked(aux: list[RouterStats]) -> RouterStats | None:
    """The statistics of several layers along a new first axis; None of none."""
    return RouterStats(*(torch.stack(x) for x in zip(*aux, strict=True))) if aux else None


def _counts(targets: list[Tensor], router: RouterStats | None) -> Counts:
    """The counts of one call, from the number of predicted tokens at each depth."""
    n = torch.stack(targets)
    if router is None:
        return Counts(n, n.new_zeros(0, 0, dtype=torch.float64), n.new_zeros(0, dtype=torch.float64))
    return Counts(n, router.choices.detach().double(), router.tokens.detach().double())
