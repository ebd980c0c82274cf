"""Where sequences begin and end."""

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
        assert segments.number[r].tolist() == [n for n, _ in row]
        assert segments.positions[r].tolist() == [p for _, p in row]
        look = [[i == j or (row[i][0] == row[j][0] >= 0 and j <= i) for j in range(t)] for i in range(t)]
        assert segments.attention_mask[r, 0].tolist() == look
        ahead = [i + 2 < t and row[i][0] == row[i + 2][0] >= 0 for i in range(t)]
        assert segments.next_is_same(2)[r].tolist() == ahead
    assert segments.real_lengths == tuple(k for row in lengths for k in (row or [0]))


def test_an_id_that_comes_back_is_another_sequence():
    segments = Segments.from_document_ids(torch.tensor([[0, 0, 1, 0]]))
    assert segments.number.tolist() == [[0, 0, 1, 2]]
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
    assert segments.number.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, -1]]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="interrupted by padding"):
        Segments.from_mask(torch.tensor([[1, 0, 1]]))
    with pytest.raises(ValueError, match="integers of shape"):
        Segments.from_document_ids(torch.zeros(3))


def test_parts_know_their_sequences():
    """Columns of packed rows go on with the sequences of the whole, wherever those began."""
    whole = Segments.from_lengths([[2, 3, 1], [], [4]])
    assert (whole.sequences, whole.packed) == (5, True)
    assert [run[:4] for run in whole.runs] == [(0, 0, 0, 2), (1, 0, 2, 5), (2, 0, 5, 6), (4, 2, 0, 4)]
    part = whole.part(3, 6).after((2, 1, 0, 0, 3))
    assert [tuple(run) for run in part.runs] == [(1, 0, 0, 2, 1), (2, 0, 2, 3, 0), (4, 2, 0, 1, 3)]
    assert part.positions.tolist() == [[1, 2, 0], [0, 0, 0], [3, 0, 0]]
    assert part.ends == (2, 3, 1, 0, 4)
    padded = Segments.from_mask(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]))
    assert padded.part(1, 3).plain
    assert not padded.part(0, 1).plain
    assert [run.row for run in padded.part(3, 4).runs] == [0]


def test_rows_of_one_whole_sequence_are_plain():
    assert Segments.from_mask(torch.ones(2, 3)).plain
    assert Segments.from_document_ids(torch.tensor([[4, 4], [5, 5]])).plain
    assert not Segments.from_document_ids(torch.tensor([[4, 4], [4, 5]])).plain
    assert not Segments.from_mask(torch.tensor([[1, 1], [0, 0]])).plain
