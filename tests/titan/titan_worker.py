"""`python -m titan_worker ARGUMENTS`: recipes.titan on a CPU; a fault may be planted in its processes."""

import os
import signal
import sys

import cpu  # noqa: F401  before torchtitan
import torch
from torch.distributed.tensor import DTensor

from recipes import titan
from recipes.scaling import evaluation, regions
from recipes.training import skips
from recipes.training.data import ValidationBatches
from recipes.training.muon import Muon

torch.set_num_threads(1)


def plant(fault):
    """Faults that the contract tests must notice."""
    if fault == "unsummed norms":  # gradients of q_norm, k_norm and Gated DeltaNet's norm stay those of own heads
        regions.shared.__globals__["copied"] = lambda x, group: x if x.ndim == 1 else whole(x, group)
    elif fault == "count graphs":
        before = titan.work

        def work(settings):
            before(settings)
            print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])

        titan.work = work
    elif fault == "skip alone" and os.environ.get("RANK") == "1":
        skips.Skips.why = lambda self, step, **numbers: ""
    elif fault == "counted twice":
        own = ValidationBatches.__iter__
        evaluation.Share.__iter__ = lambda self: share(self, list(own(self)))
    elif fault in ("muon of parts", "gate and up together"):
        from recipes.scaling.optimizers import DividedMuon

        right = DividedMuon.direction

        def direction(self, update, rows):
            if fault == "muon of parts":
                own = Muon.direction(self, update.to_local(), rows)
                shape, stride = update.shape, update.stride()
                return DTensor.from_local(own, update.device_mesh, update.placements, shape=shape, stride=stride)
            found = right(self, update.flatten(1, 2) if update.ndim == 4 else update, rows)
            return found.view(update.shape)

        DividedMuon.direction = direction
    elif fault.startswith("kill"):
        _, rank, step = fault.split()
        if os.environ.get("RANK") == rank:
            from recipes.scaling import engine

            step_of = engine.Pretrainer.train_step

            def train_step(self, data_iterator):
                if self.step == int(step):
                    os.kill(os.getpid(), signal.SIGKILL)
                step_of(self, data_iterator)

            engine.Pretrainer.train_step = train_step


def share(part, batches):
    """A share whose last batch counts, whether it is the process's own or not."""
    mine = batches[part.rank :: part.world]
    return iter(mine + batches[-1:] * (-(-len(batches) // part.world) - len(mine)))


whole = regions.copied
if "RANK" in os.environ and os.environ.get("PLANTED"):
    plant(os.environ["PLANTED"])
if __name__ == "__main__":
    sys.exit(titan.main(module="titan_worker"))
