"""Starts and ends of sequences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.segments import Segments


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(0, 3))
def test_positions_and_numbers_of_packed_rows(lengths, left):
    """Against plain Python counting, with padding on both sides."""
    t = max(sum(row) for row in lengths) + left
    ids = torch.full((len(lengths), t), -1)
    expected = [[(-1, 0)] * left + [(n, p) for n, k in enumerate(row) for p in range(k)] for row in lengths]
    for r, row in enumerate(lengths):
        ids[r, left : left + sum(row)] = torch.tensor([7 * n for n, k in enumerate(row) for _ in range(k)])
    segments = Segments.from_document_ids(ids)
    for r, row in enumerate(expected):
        row += [(-1, 0)] * (t - len(row))
        assert segments.segment_ids[r].tolist() == [n for n, _ in row]
        assert segments.positions[r].tolist() == [p for _, p in row]
        look = [[i == j or (row[i][0] == row[j][0] >= 0 and j <= i) for j in range(t)] for i in range(t)]
        assert segments.attention_mask[r, 0].tolist() == look
        ahead = [i + 2 < t and row[i][0] == row[i + 2][0] >= 0 for i in range(t)]
        assert segments.next_is_same(2)[r].tolist() == ahead
    assert segments.real_lengths == tuple(k for row in lengths for k in (row or [0]))


def test_an_id_that_comes_back_is_another_sequence():
    segments = Segments.from_document_ids(torch.tensor([[0, 0, 1, 0]]))
    assert segments.segment_ids.tolist() == [[0, 0, 1, 2]]
    assert not segments.attention_mask[0, 0, 3, 0]


def test_continuation_counts_what_the_cache_holds():
    segments = Segments.from_mask(torch.tensor([[0, 1, 1], [1, 1, 0]])).after((4, 9))
    assert segments.positions.tolist() == [[0, 4, 5], [9, 10, 0]]
    assert segments.first.tolist() == [1, 0]
    assert segments.end.tolist() == [3, 2]


def test_boundaries_for_varlen_kernels():
    segments = Segments.from_document_ids(torch.tensor([[-1, 0, 0, 1], [0, 0, -1, -1]]))
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 8]


def test_from_lengths():
    segments = Segments.from_lengths([[2, 3], [4]])
    assert segments.segment_ids.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, -1]]


def test_bad_input_is_refused():
    gapped = Segments.from_mask(torch.tensor([[1, 0, 1]]))
    for use in (lambda: gapped.runs, lambda: gapped.first, lambda: gapped.end, lambda: gapped.cu_seqlens):
        with pytest.raises(ValueError, match="Absent tokens stand within a sequence"):
            use()
    for use in (lambda: gapped.attention_mask, gapped.next_is_same):
        with pytest.raises(ValueError, match="Absent tokens stand within a sequence"):
            use()
    with pytest.raises(ValueError, match="segments describe 1 x 3 tokens, got"):
        gapped.closed(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="integers of shape"):
        Segments.from_document_ids(torch.zeros(3))


def test_parts_know_their_sequences():
    """A range of columns of packed rows continues the sequences that began before it."""
    whole = Segments.from_lengths([[2, 3, 1], [], [4]])
    assert (whole.sequences, whole.packed) == (5, True)
    assert [run[:4] for run in whole.runs] == [(0, 0, 0, 2), (1, 0, 2, 5), (2, 0, 5, 6), (4, 2, 0, 4)]
    part = whole.part(3, 6).after((2, 1, 0, 0, 3))
    assert [tuple(run) for run in part.runs] == [(1, 0, 0, 2, 1), (2, 0, 2, 3, 0), (4, 2, 0, 1, 3)]
    assert part.positions.tolist() == [[1, 2, 0], [0, 0, 0], [3, 0, 0]]
    assert part.ends == (2, 3, 1, 0, 4)
    padded = Segments.from_mask(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]))
    assert padded.part(1, 3).unpadded
    assert not padded.part(0, 1).unpadded
    assert [run.row for run in padded.part(3, 4).runs] == [0]


def test_rows_of_one_whole_sequence_are_plain():
    assert Segments.from_mask(torch.ones(2, 3)).unpadded
    assert Segments.from_document_ids(torch.tensor([[4, 4], [5, 5]])).unpadded
    assert not Segments.from_document_ids(torch.tensor([[4, 4], [4, 5]])).unpadded
    assert not Segments.from_mask(torch.tensor([[1, 1], [0, 0]])).unpadded


def test_rows_with_holes_are_moved_together():
    mask = torch.tensor([[0, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1]])
    segments = Segments.from_mask(mask)
    assert segments.gapped
    assert segments.real_lengths == (3, 7, 0, 4)
    x = torch.arange(28).view(4, 7)
    together, closed = segments.closed(x)
    assert not closed.gapped
    assert together[:, :4].tolist() == [[0, 1, 4, 5], [7, 8, 9, 10], [14, 15, 16, 17], [21, 23, 25, 27]]
    assert closed.mask.tolist() == [[0, 1, 1, 1, 0, 0, 0], [1] * 7, [0] * 7, [1, 1, 1, 1, 0, 0, 0]]
    assert torch.equal(segments.reopened(together), x)
    deep = x[..., None].expand(-1, -1, 3)
    assert torch.equal(segments.reopened(segments.closed(deep)[0]), deep)
    packed = Segments.from_document_ids(torch.tensor([[3, -1, 3, -1, 4, 4, -1, 5]]))
    assert packed.gapped
    assert packed.closed(torch.arange(8)[None])[0].tolist() == [[0, 2, 4, 5, 7, 1, 3, 6]]
    assert not Segments.from_document_ids(torch.tensor([[3, 3, -1, -1, 4, 4, -1, 5]])).gapped
