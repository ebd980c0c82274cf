"""`python -m titan_worker ARGUMENTS`: recipes.titan on a CPU; a fault may be planted in its processes."""

import os
import signal
import sys

import cpu  # noqa: F401  before torchtitan
import torch

from recipes import titan
from recipes.scaling import regions

torch.set_num_threads(1)


def plant(fault):
    """Faults that the contract tests must notice."""
    if fault == "unsummed norms":  # gradients of q_norm, k_norm and Gated DeltaNet's norm stay those of own heads
        regions.shared.__globals__["copied"] = lambda x, group: x if x.ndim == 1 else whole(x, group)
    elif fault.startswith("kill"):
        _, rank, step = fault.split()
        if os.environ.get("RANK") == rank:
            from recipes.scaling import engine

            before = engine.Pretrainer.train_step

            def train_step(self, data_iterator):
                if self.step == int(step):
                    os.kill(os.getpid(), signal.SIGKILL)
                before(self, data_iterator)

            engine.Pretrainer.train_step = train_step


whole = regions.copied
if "RANK" in os.environ and os.environ.get("PLANTED"):
    plant(os.environ["PLANTED"])
if __name__ == "__main__":
    sys.exit(titan.main(module="titan_worker"))
