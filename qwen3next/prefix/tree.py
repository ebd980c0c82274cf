"""A prefix tree of texts. Each node is a span of tokens with its keys and values, and may hold a state."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from layers.state.kv_cache import KVCache, Stored
from qwen3next.cache.hybrid import HybridCache, common_prefix
from qwen3next.files.tensor_files import memory_of

Piece = list[Stored]  # keys and values per softmax layer, the MTP layer last


@dataclass
class End:
    """The state after a node's last token, which continuing needs besides keys and values."""

    states: list[tuple[Tensor, Tensor]]  # per Gated DeltaNet layer: conv state, recurrent state
    hidden: Tensor
    logits: Tensor | None

    @property
    def nbytes(self) -> int:
        logits = 0 if self.logits is None else self.logits.nbytes
        return sum(conv.nbytes + recurrent.nbytes for conv, recurrent in self.states) + self.hidden.nbytes + logits


@dataclass(eq=False)
class Node:
    """Tokens `begin` up to `end` of texts with a common prefix.

    Attributes:
        tokens: (end − begin,) on the CPU.
        piece, finish: keys and values, and the state; None if they are only in `file`, or if no state is kept.
        file: the node's file, if written.
        ends: whether a state is kept, in memory or in the file.
        full: whether the budget had no room for the tokens after this node.
        used: when the node was last used, by the store's clock.
    """

    tokens: Tensor
    begin: int = 0
    parent: "Node | None" = None
    piece: Piece | None = None
    finish: End | None = None
    file: Path | None = None
    ends: bool = False
    full: bool = False
    used: int = 0
    children: list["Node"] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.begin + len(self.tokens)

    @property
    def path(self) -> list["Node"]:
        """The nodes from the start of the text to this one, without the root."""
        found: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]

    @property
    def text(self) -> Tensor:
        """All tokens from the start of the text to the end of this node."""
        return torch.cat([self.tokens[:0], *(node.tokens for node in self.path)])

    @cached_property
    def name(self) -> str:
        """Of its file: a hash of the text, which stays the same where the node is split."""
        return hashlib.sha256(memory_of(self.text.contiguous())).hexdigest()[:32]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        piece = sum(x.nbytes for stored in self.piece or () for x in stored)
        return piece + (0 if self.finish is None else self.finish.nbytes)

    def follow(self, ids: Tensor) -> "tuple[Node, Node | None, int]":
        """Follow these tokens from the root, which this node must be.

        Returns: the last node that matches completely, the child of it that matches partly (or None), and the number of
            matching tokens in total.
        """
        node, depth = self, 0
        while True:
            agree = [(common_prefix(child.tokens, ids[depth:]), child) for child in node.children]
            count, child = max(agree, key=lambda pair: pair[0], default=(0, self))
            if count < len(child.tokens) or not count:
                return node, child if count else None, depth + count
            node, depth = child, depth + count

    def below(self) -> list["Node"]:
        """This node and all its descendants."""
        return [self, *(node for child in self.children for node in child.below())]

    def split(self, at: int, *, mtp: bool) -> "Node":
        """Split before token `at`; returns the upper part, which takes this node's place and has no state.

        Args:
            mtp: whether the last layer of `piece` is the MTP layer.
        """
        assert self.parent is not None
        assert self.piece is not None
        assert self.begin < at < self.end
        upper = Node(self.tokens[: at - self.begin].clone(), self.begin, self.parent, used=self.used)
        upper.piece, lower = [], []
        for i, stored in enumerate(self.piece):
            behind = mtp and i == len(self.piece) - 1
            n = (max(at - 1, 0) - max(self.begin - 1, 0)) if behind else at - self.begin
            upper.piece.append(tuple(x[:, :, :n].clone() for x in stored))
            lower.append(tuple(x[:, :, n:].clone() for x in stored))
        self.piece = lower
        upper.children = [self]
        self.parent.children[self.parent.children.index(self)] = upper
        self.tokens, self.begin, self.parent = self.tokens[at - self.begin :].clone(), at, upper
        return upper


def keys_and_values(cache: HybridCache) -> list[KVCache]:
    """The KV states of the softmax layers, the MTP layer last."""
    softmax = [s for s in cache.layers if isinstance(s, KVCache)]
    return softmax if cache.mtp is None else [*softmax, cache.mtp]


def places(cache: HybridCache, begin: int, end: int) -> list[tuple[KVCache, int, int]]:
    """The KV states and positions of these tokens. MTP's are one position behind, as each needs the next token."""
    return [
        (s, max(begin - 1, 0), max(end - 1, 0)) if s is cache.mtp else (s, begin, end) for s in keys_and_values(cache)
    ]


def cut_out(cache: HybridCache, begin: int, end: int) -> Piece:
    """A copy of the keys and values of these tokens of a cache."""
    return [s.copy(a, b) for s, a, b in places(cache, begin, end)]
