import torch

from numprune.slices import GONE, Extent, Kept, Size, Slice


def test_the_entries_of_units_in_stacked_and_interleaved_parts():
    kept = Kept.whole(torch.tensor([0, 2]), members=1)
    parts = (Extent(2), Extent(1))
    stacked, interleaved = (Slice("x", 0, parts, 4, interleaved=value) for value in (False, True))
    assert stacked.entries(kept, Size(3)).tolist() == [0, 1, 4, 5, 6, 8]
    assert stacked.entries(kept, Size(3), part=1).tolist() == [6, 8]
    assert interleaved.entries(kept, Size(3)).tolist() == [0, 1, 2, 6, 7, 8]
    assert interleaved.entries(kept, Size(3), part=1).tolist() == [2, 8]


def test_every_unit_keeps_undivided_parts_whole():
    """Two units of three members; a part of two entries for each member, and one of a single entry for each unit."""
    kept = Kept(torch.tensor([1]), torch.tensor([[0, 2]]))
    parts = (Extent(2, divided=True), Extent(1))
    stacked, interleaved = (Slice("x", 0, parts, 4, interleaved=value) for value in (False, True))
    assert stacked.entries(kept, Size(2, 3)).tolist() == [6, 7, 10, 11, 13]
    assert interleaved.entries(kept, Size(2, 3)).tolist() == [7, 8, 11, 12, 13]
    assert stacked.shape(Size(2, 3)) == (14, 4)
    assert stacked.shape(kept.size) == (5, 4)


def test_members_of_no_unit_are_not_counted():
    assert Kept.whole(torch.tensor([], dtype=torch.long), members=3).size == GONE
    assert Kept.whole(torch.tensor([4]), members=3).size == Size(1, 3)
