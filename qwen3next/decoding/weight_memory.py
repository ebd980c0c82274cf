"""Notice that a weight lies elsewhere or is read otherwise than before."""

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

ADDRESS = torch._C.TensorBase.data_ptr
SAME_MEMORY = torch._C.TensorBase.is_set_to  # same storage, offset, sizes and strides
DTYPE, WEIGHT = attrgetter("dtype"), itemgetter("weight")


class Weights:
    """Where weights lie and how they are read: address, sizes, strides, dtype. Which object holds them is all the same.

    Tensors are never compared by ==: that would compare their numbers, which may be many, or have no memory.
    """

    def __init__(self, named: list[dict[str, Any]]):
        plain: dict[int, Tensor] = {}  # each once, however often it is tied
        self._single: list[dict[str, Any]] = []
        self._several: list[dict[str, Any]] = []
        self._others: list[tuple[dict[str, Any], str, object]] = []
        for names in named:
            found = [x for x in names.values() if x is not None]
            new = all(type(x) in (Tensor, nn.Parameter) and id(x) not in plain for x in found)
            if new and len(found) == 1 and names.get("weight") is not None:
                self._single.append(names)
            elif new and len(found) == len(names):
                self._several.append(names)
            else:  # tied, of other classes, or absent: the same object as before
                self._others += [(names, name, x) for name, x in names.items()]
                continue
            plain |= {id(x): x for x in found}
        tensors = self._now()
        self._addresses = list(map(ADDRESS, tensors))
        self._memory = [x.detach() for x in tensors]  # kept alive: no other tensor can get its address
        self._dtypes = list(map(DTYPE, tensors))
        self._guards: Any = None
        sizes: Any = [list(x.shape) for x in tensors]
        strides: Any = [list(x.stride()) for x in tensors]
        try:  # in a third of the time, by what torch.compile does it with, which is no public part of torch
            from torch._C._dynamo.guards import TensorGuards

            self._guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        except Exception:  # moved or changed in some release: `hold` then compares by torch's public functions
            pass

    def _now(self) -> list[Tensor]:
        values: Iterator[Any] = chain(map(WEIGHT, self._single), *map(dict.values, self._several))
        return list(values)

    def hold(self) -> bool:
        """Whether nothing about them has changed. Raises: whatever comes of looking at what is no weight any more."""
        now = self._now()
        return (
            list(map(ADDRESS, now)) == self._addresses
            and all([names[name] is x for names, name, x in self._others])
            and (
                (self._guards is not None and self._guards.check(*now))
                # Whatever else TensorGuards minds: gradients wanted, modes of torch.
                or (all(map(SAME_MEMORY, now, self._memory)) and list(map(DTYPE, now)) == self._dtypes)
            )
        )
