"""The parts of a training step: learning rate, parameter groups, gradient accumulation; and losses of documents."""

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

FLAT = 0.8  # share of the steps after which "wsd" decays


def learning_rate(step: int, total: int | None, settings: Settings) -> float:
    """The learning rate of step 0, 1, …; `total` is None while unknown, which is only during warm-up."""
    warmup = max(settings.warmup, MEASURED_STEPS) if settings.minutes else settings.warmup
    rise = min(1.0, (step + 1) / max(warmup, 1))
    if total is None:
        return settings.lr * rise
    if settings.schedule == "wsd":
        return settings.lr * min(rise, (total - step) / ((1 - FLAT) * total))
    warmup = min(warmup, total // 2)  # so that a run shorter than its warm-up still decays
    done = max(step - warmup, 0) / max(total - warmup, 1)
    return settings.lr * min(rise, 0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups, with and without weight decay.

    Decay pulls towards zero, so it applies to parameters for which zero is neutral: matrices, and zero-centred norm
    weights, whose scale is 1 + weight (they were decayed in the training of the released models). Zero is not neutral
    for A_log and dt_bias, where it means a particular decay rate, nor for the weights of the gated norm and of norms
    that are not zero-centred, which start at 1. The embedding of a rare token would shrink in all steps without it.
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
    """Accumulate the gradients of one big batch in parts; return its losses and `targets`, the predicted tokens.

    The next-token and MTP means of a part are weighted by its share of their predicted tokens, so that these losses and
    their gradients equal those of one big batch. Router losses are weighted by tokens. The balance loss is a product of
    means, so the result is the mean over the parts: each part is balanced separately. A part without predicted tokens
    is left out; if all are, losses are zero and there are no gradients.
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
    """Summed cross-entropy in nats of every document in `batches`, by its number."""
    nats = dict.fromkeys(batches.documents, 0.0)
    device = model.embed_tokens.weight.device
    for batch in batches:
        ids, segments = batch.input_ids.to(device), Segments.from_document_ids(batch.document_ids.to(device))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            hidden = model(ids, segments=segments, logits_to_keep=1).hidden
            for row, document in enumerate(batch.documents.tolist()):  # one row at a time, because logits are large
                end = int(segments.end[row])
                logits = model.hook_logits(model.lm_head(hidden[row : row + 1, : end - 1]))[0].float()
                nats[document] += F.cross_entropy(logits, ids[row, 1:end], reduction="sum").item()
    return nats
