"""DDP and FSDP2 over gloo on the classes of qwen3next/hf.py: the loss and gradients of one process, with idle experts.

Two processes on a CPU. Some experts get no token of one process, others none of either.
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
EXPERTS = 16


def made(folder):
    from transformers import AutoModelForCausalLM

    import qwen3next.hf  # noqa: F401

    # The sum of the losses' gradients is then the gradient of the sum: the balance loss is none.
    return AutoModelForCausalLM.from_pretrained(folder, router_aux_loss_coef=0.0)


def tokens(rank):
    """Few tokens over and over: few of 16 experts are chosen, and other ones in the other process."""
    return (torch.arange(4) * 3 + 40 * rank).repeat(2, 5)


def idle(model, ids):
    """(layer, expert) of every expert that gets no token of these."""
    logits = model(ids, output_router_logits=True, use_cache=False).router_logits
    count = model.config.num_experts_per_tok
    chosen = {(i, e) for i, x in enumerate(logits) for e in x.topk(count).indices.flatten().tolist()}
    return {(i, e) for i in range(len(logits)) for e in range(EXPERTS)} - chosen


def step(run, ids):
    """The loss; gradients are left in the parameters."""
    loss = run(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True).loss
    loss.backward()
    return loss.detach()


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def compared(loss, model, alone, batches):
    """Raises: AssertionError if loss, a gradient or an idle expert differs from the mean over these in one process."""
    expected = sum(step(alone, ids) for ids in batches) / len(batches)
    torch.distributed.all_reduce(loss)
    assert (loss / len(batches) - expected).abs() <= 1e-5
    nobody = set.intersection(*(idle(alone, ids) for ids in batches))
    for (name, got), one in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert got.grad is not None, name
        mine, single = full(got.grad), one.grad / len(batches)
        assert torch.allclose(mine, single, rtol=1e-4, atol=1e-6 * single.abs().max().item()), name
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            layer = int(name.split("layers.")[1].split(".")[0])
            for expert in range(EXPERTS):
                assert bool(mine[expert].any()) == ((layer, expert) not in nobody), name


def work(folder, fault):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    rank, batches = torch.distributed.get_rank(), [tokens(0), tokens(1)]
    model = made(folder)
    without = [idle(model, ids) for ids in batches]
    assert set.intersection(*without)
    assert without[0] - without[1]
    assert without[1] - without[0]
    mine = tokens(0) if fault == "tokens" else batches[rank]
    if fault == "idle" and rank == 1:  # its idle experts get a gradient
        model.model.layers[0].mlp.experts.down_proj.register_hook(lambda g: g + 1e-3 * (g == 0))
    parallel = nn.parallel.DistributedDataParallel(model)
    compared(step(parallel, mine), model, made(folder), batches)

    model = made(folder)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    compared(step(model, mine), model, made(folder), batches)
    torch.distributed.destroy_process_group()


def ran(folder, fault=""):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", __file__]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, str(folder), fault], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["", "tokens", "idle"])
def test_two_processes_have_the_gradients_of_one(tmp_path, fault):
    """Two planted faults must fail: the same tokens in both processes, and a gradient of an idle expert."""
    pytest.importorskip("transformers", minversion="5.23")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "full_attention_interval": 2, "num_experts": EXPERTS, "initializer_range": 0.1}
    q.Qwen3Next(q.presets.tiny(mtp_num_hidden_layers=0, **sizes)).save_pretrained(tmp_path)
    done = ran(tmp_path, fault)
    assert (done.returncode == 0) == (not fault), done.stderr[-3000:]
    assert not fault or "in compared" in done.stderr


if __name__ == "__main__":
    work(*sys.argv[1:3])
