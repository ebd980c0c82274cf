"""DDP and FSDP2 over gloo, two processes on a CPU, with experts that get no token: the gradients of one process.

This file is also the program that runs in each process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn

import qwen3next as q

ROOT = Path(__file__).parents[2]
STEPS, RATE = 2, 0.1


class Loss(nn.Module):
    """What DDP wraps: its forward is the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model.loss(ids).total


def made():
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "full_attention_interval": 2, "num_experts": 16, "initializer_range": 0.1}
    return q.Qwen3Next(q.presets.tiny(**sizes))


def tokens(rank):
    """Four tokens over and over: few of 16 experts are chosen, and other ones in the other process."""
    return (torch.arange(4) * 3 + 40 * rank).repeat(2, 5)


def trained(model, loss, batches):
    """The model's parameters after some steps on the mean of the batches' gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for ids in batches:
            (loss(ids) / len(batches)).backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    return model


def compared(parameters, alone):
    """Raises: AssertionError if they differ from those of one process."""
    for (name, got), expected in zip(parameters, alone.parameters(), strict=True):
        full = got.full_tensor() if hasattr(got, "full_tensor") else got
        assert torch.allclose(full, expected, rtol=1e-4, atol=1e-6), name


def work():
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = made()
    both = [tokens(0), tokens(1)]
    unused = [set(range(16)) - _chosen(model, ids) for ids in both]
    assert all(unused)
    assert unused[0] != unused[1]
    alone = trained(*_alone(), both)

    parallel = nn.parallel.DistributedDataParallel(Loss(model))
    trained(parallel, parallel, [tokens(rank)])
    compared(model.named_parameters(), alone)

    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = made()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "loss")
    trained(model, Loss(model), [tokens(rank)])
    compared(model.named_parameters(), alone)
    torch.distributed.destroy_process_group()


def _alone():
    model = made()
    return model, Loss(model)


def _chosen(model, ids):
    _, acts = model.run_with_cache(ids, names_filter="blocks.*.mlp.hook_router_indices")
    return {int(x) for indices in acts.values() for x in indices.flatten()}


@pytest.mark.slow
def test_two_processes_train_as_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", __file__]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    work()
