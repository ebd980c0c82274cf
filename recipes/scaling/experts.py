"""Expert parallelism: rows travel to the processes that hold their experts, and back."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from layers.moe import Experts
from recipes.scaling.regions import Substitution, substituted

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def exchanged_experts(
    experts: Experts, mesh: DeviceMesh, tensor: DeviceMesh | None, own: Sequence[Substitution]
) -> Forward:
    """`Experts.forward` where process i of the mesh holds the i-th part of the experts.

    Args:
        tensor: mesh of TP, whose processes have the same rows: each sends its share of them, and the results of the
            others are zero here. The region around it sums them.
        own: the experts of this process stand for all.
    """
    compute = experts.forward

    def forward(x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        if tensor is None:
            return exchanged(x, weights, indices)
        rank, size, n = tensor.get_local_rank(), tensor.size(), len(x)
        begin, end = n * rank // size, n * (rank + 1) // size
        y = exchanged(x[begin:end], weights[begin:end], indices[begin:end])
        return F.pad(y, (0, 0, begin, n - end))

    def exchanged(x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        group, world, k = mesh.get_group(), mesh.size(), indices.shape[1]
        count = own_count(experts)
        flat = indices.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=count * world)  # (world · count)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=group)
        send, receive = (n.view(world, count).sum(1).tolist() for n in (counts, received))
        rows = all_to_all_single_autograd(x[order // k], receive, send, group)
        number = torch.arange(count, device=x.device).repeat(world).repeat_interleave(received)
        some = len(rows)
        if not some:  # one row of zeros, so that weights have gradients on every process, which FSDP sums
            rows, number = F.pad(rows, (0, 0, 0, 1)), number.new_zeros(1)
        with substituted(own):
            out = compute(rows, rows.new_ones(len(rows), 1), number[:, None])[:some]
        back = all_to_all_single_autograd(out, send, receive, group)
        # Weighted and added up in fp32, as everywhere.
        scaled = back.float() * weights.flatten()[order, None]
        return torch.zeros_like(x, dtype=torch.float32).index_add(0, order // k, scaled).to(x.dtype)

    return forward


def own_count(experts: Experts) -> int:
    """How many experts this process computes."""
    down = experts._parameters["down_proj"]
    assert down is not None
    return down.to_local().shape[0] if hasattr(down, "to_local") else down.shape[0]
