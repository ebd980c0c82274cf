"""The parts of a training step: learning rate, parameter groups, accumulated gradients; and held-out text."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import qwen3next as q
from layers.gated_deltanet import GatedDeltaNet
from layers.norm import GatedRMSNorm, RMSNorm
from layers.segments import Segments
from recipes.training.data import Batch, ValidationBatches
from recipes.training.report import Row
from recipes.training.settings import MEASURED_STEPS, Settings

FLAT = 0.8  # share of the steps after which "wsd" falls


def learning_rate(step: int, total: int | None, settings: Settings) -> float:
    """Of step 0, 1, …; `total` is None as long as the number of steps is not known, which warm-up outlasts."""
    warmup = max(settings.warmup, MEASURED_STEPS) if settings.minutes else settings.warmup
    rise = min(1.0, (step + 1) / max(warmup, 1))
    if total is None:
        return settings.lr * rise
    if settings.schedule == "wsd":
        return settings.lr * min(rise, (total - step) / ((1 - FLAT) * total))
    warmup = min(warmup, total // 2)  # a run that ends within its warm-up falls all the same
    done = max(step - warmup, 0) / max(total - warmup, 1)
    return settings.lr * min(rise, 0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: what decays and what does not.

    Decay pulls towards zero, so it serves where zero is neutral: for matrices, and for zero-centred norm weights, whose
    scale is 1 + weight (the released models' training decayed them). Zero is not neutral for A_log and dt_bias (a
    memory of one particular length) nor for the weights of the gated norm and of norms that are not zero-centred (they
    start at 1: what they scale would fade); and a rare token's embedding would shrink in all the steps that do not see
    it.
    """
    spared: set[int] = set()
    for module in model.modules():
        if isinstance(module, GatedDeltaNet):
            spared |= {id(p) for name, p in module.named_parameters() if name in ("A_log", "dt_bias")}
        elif isinstance(module, (GatedRMSNorm, nn.Embedding)) or (
            isinstance(module, RMSNorm) and not module.zero_centred
        ):
            spared.add(id(module.weight))
    decaying = [p for p in model.parameters() if id(p) not in spared]
    others = [p for p in model.parameters() if id(p) in spared]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def accumulate_gradients(model: q.Qwen3Next, micro: list[Batch], *, precision: str) -> Row:
    """Add the gradients of one big batch, computed in parts; return its losses, and `targets`, predicted tokens.

    A part's mean counts by its share of the predicted tokens, those of MTP by theirs, so that the next-token and MTP
    losses and their gradients are those of one big batch. Router losses count by the tokens; the balance loss is a
    product of means, so it is the mean of the parts' own: each part is balanced by itself. A part in which nothing is
    predicted is left out; if that is all of them, losses are zero and there are no gradients.
    """
    device, config = model.embed_tokens.weight.device, model.config
    whole = [(batch, Segments.from_document_ids(batch.document_ids.to(device))) for batch in micro]
    parts = [(batch, s) for batch, s in whole if bool(s.next_is_same().any())]
    shares = [_shares([int(s.next_is_same(ahead).sum()) for _, s in parts]) for ahead in (1, 2)]
    tokens = _shares([int(s.mask.sum()) for _, s in parts])
    row: Row = dict.fromkeys(("loss", "lm", "mtp", "balance", "z", "max_load"), 0.0) | {"targets": 0}
    for (batch, own), first, second, share in zip(parts, *shares, tokens, strict=True):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            losses = model.loss(batch.input_ids.to(device), segments=own)
        router = config.router_aux_loss_coef * losses.balance + config.router_z_loss_coef * losses.z
        loss = first * losses.lm + second * config.mtp_loss_coef * losses.mtp + share * router
        loss.backward()
        weighed = (loss, first * losses.lm, second * losses.mtp, share * losses.balance, share * losses.z)
        for name, part in zip(("loss", "lm", "mtp", "balance", "z"), weighed, strict=True):
            row[name] += part.item()
        row["targets"] += losses.targets
        if losses.load is not None:
            row["max_load"] += losses.load.max().item() * config.num_experts * share
    return row


def _shares(counts: list[int]) -> list[float]:
    return [count / max(sum(counts), 1) for count in counts]


@torch.no_grad()
def held_out_nats(model: q.Qwen3Next, batches: ValidationBatches, *, precision: str) -> dict[int, float]:
    """Summed cross-entropy in nats of every document of `batches`, by its number."""
    nats = dict.fromkeys(batches.documents, 0.0)
    device = model.embed_tokens.weight.device
    for batch in batches:
        ids, segments = batch.input_ids.to(device), Segments.from_document_ids(batch.document_ids.to(device))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            hidden = model(ids, segments=segments, logits_to_keep=1).hidden
            for row, document in enumerate(batch.documents.tolist()):  # a row at a time: logits are large
                end = int(segments.end[row])
                logits = model.hook_logits(model.lm_head(hidden[row : row + 1, : end - 1]))[0].float()
                nats[document] += F.cross_entropy(logits, ids[row, 1:end], reduction="sum").item()
    return nats
