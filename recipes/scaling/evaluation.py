"""Held-out text measured by all processes together, with the measures of `recipes.training.evaluation`.

Batches are dealt out to the groups of processes that see different text. FSDP and EP exchange messages in every
forward pass, so each process runs equally many.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

import qwen3next as q
from recipes.scaling.regions import Group
from recipes.training.data import ValidationBatch, ValidationBatches
from recipes.training.evaluation import GATES, HeldOut, look
from recipes.training.report import Row
from recipes.training.steps import held_out_nats


class Share(ValidationBatches):
    """Every `world`-th batch of a source. Where a process would have one less than others, it runs the last one too.

    The rows of that one are no document's (-1), so they do not count twice.
    """

    def __init__(self, whole: ValidationBatches, *, rank: int, world: int) -> None:
        super().__init__(whole.folder, window=whole.window, batch_size=whole.batch_size, documents=whole.documents)
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[ValidationBatch]:
        count, last = 0, None
        for last in super().__iter__():
            if count % self.world == self.rank:
                yield last
            count += 1
        if last is not None and 0 < count % self.world <= self.rank:
            yield last._replace(documents=torch.full_like(last.documents, -1))


class DividedHeldOut(HeldOut):
    """The held-out documents, measured by the processes of a group.

    Args:
        batch: the processes that see different text; None: this one has to run all batches.
        tensor: the processes that share heads (TP); None: this one has all of them.
    """

    def __init__(self, batches: dict[str, ValidationBatches], *, batch: Group, tensor: Group) -> None:
        super().__init__(batches)
        self.batch, self.tensor = batch, tensor

    def part(self, tokens: int) -> "DividedHeldOut":
        return DividedHeldOut(super().part(tokens).batches, batch=self.batch, tensor=self.tensor)

    def nats(self, model: q.Qwen3Next, *, precision: str) -> dict[str, dict[int, float]]:
        if self.batch is None:
            return super().nats(model, precision=precision)
        rank, world = self.batch.rank(), self.batch.size()
        own = {
            name: held_out_nats(model, Share(b, rank=rank, world=world), precision=precision)
            for name, b in self.batches.items()
        }
        device = model.embed_tokens.weight.device
        values = [x for nats in own.values() for x in nats.values()]
        vector = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(vector, group=self.batch)
        sums = iter(vector.tolist())
        return {name: {document: next(sums) for document in nats} for name, nats in own.items()}

    def look(self, root: Any, *, precision: str, mtp_depths: int, needles: Sequence[int]) -> Row:
        """The measures of a validation, equal on all processes."""
        row = gathered(root, partial(look, part=self, precision=precision, mtp_depths=mtp_depths, needles=needles))
        names = [name for name in GATES if name in row]
        if self.tensor is not None and names:  # means over this process's heads; each has equally many
            device = next(root.parameters()).device
            means = torch.tensor([row[name] for name in names], dtype=torch.float64, device=device)
            dist.all_reduce(means, group=self.tensor)
            row |= dict(zip(names, (means / self.tensor.size()).tolist(), strict=True))
        return row


@torch.no_grad()
def gathered(root: Any, measure: Callable[[q.Qwen3Next], Any]) -> Any:
    """`measure(model)` with the inner model of a divided one, within its forward, where weights are gathered."""
    with torch.compiler.set_stance("force_eager"):  # batches of other shapes would compile the blocks again
        found = root(lambda: measure(root.core))
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the outermost keeps its weights whole after a forward, and the optimizer needs its part
    return found
