"""The parts of a training step: learning rate, parameter groups, gradient accumulation; and losses of documents."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qwen3next as q
from layers.gated_deltanet import GatedDeltaNet
from layers.norm import GatedRMSNorm, RMSNorm
from layers.segments import Segments
from qwen3next.losses import Counts, sum_of
from recipes.training.data import Batch, LabelledBatch, ValidationBatches
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


def accumulate_gradients(
    model: q.Qwen3Next,
    micro: Sequence[Batch | LabelledBatch],
    *,
    precision: str,
    balance: str = "batch",
    mtp_depths: int = 1,
) -> Row:
    """Accumulate the gradients of one big batch in parts; return its losses and `targets`, the predicted tokens.

    Losses are sums over all tokens divided by counts of all tokens, so a part needs the counts of the others. How often
    each expert was chosen in the whole batch is known only after a forward pass of all parts. So with several parts and
    `balance` "batch" each part runs forward twice: first to count, then for its gradients. Losses and gradients are
    then those of the whole batch. "micro" runs once and balances each part by itself.

    If no token of any part is to be predicted, losses are zero and there are no gradients.
    """
    device, config = model.embed_tokens.weight.device, model.config
    parts = [Part.of(batch, device) for batch in micro]
    names = ("loss", "lm", "mtp", "balance", "z", "logit_z")
    row: Row = dict.fromkeys((*names, "max_load", "load_entropy"), 0.0) | {"targets": 0}
    if not any(bool(part.targets(1)) for part in parts):
        return row

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    counts: Counts | None = None
    if len(parts) > 1:
        found = []
        for part in parts:
            if balance == "micro":
                found.append(token_counts(model, part, mtp_depths))
            else:
                with autocast():
                    found.append(model.loss_counts(part.input_ids, **part.options, mtp_depths=mtp_depths))
        counts = sum_of(found)
    choices: Tensor | float = 0.0
    for part in parts:
        with autocast():
            sums = model.loss_sums(part.input_ids, **part.options, mtp_depths=mtp_depths)
        losses = sums.losses(config, _balanced_alone(sums.counts, counts) if balance == "micro" else counts)
        losses.total.backward()
        for name in names:
            row[name] += getattr(losses, "total" if name == "loss" else name).item()
        row["targets"] += losses.targets
        choices = choices + sums.counts.choices
    if isinstance(choices, Tensor) and choices.numel():
        load = choices / choices.sum(-1, keepdim=True)
        experts = load.shape[-1]
        row["max_load"] = load.max().item() * experts
        # Of a layer: 1 for an even load, 0 where one expert takes all.
        entropy = -(load * load.clamp(min=1e-30).log()).sum(-1).mean()
        row["load_entropy"] = entropy.item() / math.log(max(experts, 2))
    return row


class Part(NamedTuple):
    """A micro-batch on the model's device."""

    input_ids: Tensor
    segments: Segments
    labels: Tensor | None

    @classmethod
    def of(cls, batch: Batch | LabelledBatch, device: torch.device) -> "Part":
        labels = batch.labels.to(device) if isinstance(batch, LabelledBatch) else None
        return cls(batch.input_ids.to(device), Segments.from_document_ids(batch.document_ids.to(device)), labels)

    @property
    def options(self) -> dict[str, Any]:
        return {"segments": self.segments, "labels": self.labels}

    def targets(self, ahead: int) -> Tensor:
        """How many tokens are predicted from the one `ahead` places before them."""
        place = self.segments.next_is_same(ahead)
        return (place if self.labels is None else place & (self.labels.roll(-ahead, dims=1) != -100)).sum()


def token_counts(model: q.Qwen3Next, part: Part, mtp_depths: int) -> Counts:
    """The counts of a part that follow from its segments, without a forward pass; no expert is counted as chosen."""
    segments, config = part.segments, model.config
    drafts = mtp_depths if model.mtp is not None and config.mtp_loss_coef > 0 else 0
    tokens = [segments.mask.sum() for block in model.blocks if block.sparse]
    if drafts and config.num_experts:
        pairs = torch.stack([segments.next_is_same(depth).sum() for depth in range(1, drafts + 1)]).sum()
        tokens += [pairs] * config.mtp_num_hidden_layers
    layers = torch.stack(tokens).double() if tokens else torch.zeros(0, dtype=torch.float64, device=segments.device)
    choices = layers.new_zeros(len(tokens), config.num_experts if tokens else 0)
    return Counts(torch.stack([part.targets(ahead) for ahead in range(1, drafts + 2)]), choices, layers)


def _balanced_alone(own: Counts, whole: Counts | None) -> Counts | None:
    """The whole batch's counts with a part's own choices, scaled up to as many tokens."""
    if whole is None:
        return None
    return Counts(whole.targets, own.choices * (whole.tokens / own.tokens.clamp(min=1))[:, None], whole.tokens)


@torch.no_grad()
def held_out_nats(model: q.Qwen3Next, batches: ValidationBatches, *, precision: str) -> dict[int, float]:
    """Summed cross-entropy in nats of every document in `batches`, by its number. Rows of document -1 do not count."""
    nats = dict.fromkeys(batches.documents, 0.0)
    device = model.embed_tokens.weight.device
    for batch in batches:
        ids, segments = batch.input_ids.to(device), Segments.from_document_ids(batch.document_ids.to(device))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            hidden = model(ids, segments=segments, logits_to_keep=1).hidden
            for row, document in enumerate(batch.documents.tolist()):  # one row at a time, because logits are large
                if document < 0:
                    continue
                end = int(segments.end[row])
                logits = model.hook_logits(model.lm_head(hidden[row : row + 1, : end - 1]))[0].float()
                nats[document] += F.cross_entropy(logits, ids[row, 1:end], reduction="sum").item()
    return nats
