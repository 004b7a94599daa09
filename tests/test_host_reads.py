"""Losses and heads make no host wait, but for the reads that are listed here."""

import pytest
import torch
from host_reads import HostReads

from lit_logits.functional import checks
from lit_logits.functional.alignment import align_positions
from lit_logits.functional.gld_fusion import matched_graph_bound
from lit_logits.functional.gradients import align_gradients
from lit_logits.functional.reductions import true_places


def as_on_device(function, *args, **kwargs):
    """Run with CPU tensors what an accelerator would run; return the result and the reads."""
    with pytest.MonkeyPatch.context() as patch, HostReads() as reads:
        patch.setattr(checks, "_READABLE_DEVICES", set())
        found = function(*args, **kwargs)
    return found, reads.found


def partners_by_loops(ends1, ends2):
    """For each position, the last of the other that has read as much; of several with one end the last one counts."""
    found = torch.full_like(ends1, -1)
    for b, row in enumerate(ends1.tolist()):
        other = ends2[b].tolist()
        for end in {end for end in row if end >= 0}:
            place = max(t for t, value in enumerate(row) if value == end)
            found[b, place] = max((u for u, value in enumerate(other) if value == end), default=-1)
    return found


def random_ends(g, batch, size):
    """Ends that do not fall, with repeats, and gaps of −1 anywhere."""
    ends = torch.randint(0, 3, (batch, size), generator=g).cumsum(-1)
    return ends.masked_fill(torch.rand(batch, size, generator=g) < 0.3, -1)


def test_positions_are_aligned_without_reads():
    g = torch.Generator().manual_seed(0)
    for size1, size2 in [(1, 1), (7, 5), (5, 9), (12, 12), (0, 3), (3, 0)] * 10:
        ends1, ends2 = random_ends(g, 4, size1), random_ends(g, 4, size2)
        found, reads = as_on_device(align_positions, ends1, ends2)
        assert not reads
        assert torch.equal(found, partners_by_loops(ends1, ends2))


def test_places_of_a_known_number_are_found_without_reads():
    mask = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    found, reads = as_on_device(true_places, mask, int(mask.sum()))
    assert not reads
    assert torch.equal(found, mask.flatten().nonzero().squeeze(1))
    assert len(as_on_device(true_places, mask)[1]) == 1


def test_matched_graphs_are_compared_without_reads():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(2, 2, 4, 3, generator=g)
    ids = torch.stack([torch.randperm(9, generator=g)[:3] for _ in range(16)]).view(2, 2, 4, 3)
    table = torch.tensor([3, -1, 0, 5, 5, -1, 8, 2, 1])
    args = (values[0], ids[0], values[1], ids[1])
    found, reads = as_on_device(matched_graph_bound, *args, source_to_student=table)
    assert not reads
    torch.testing.assert_close(found, matched_graph_bound(*args, source_to_student=table))


def test_gradients_are_aligned_without_reads():
    grads, references = ([torch.randn(3, 2), torch.randn(4)] for _ in range(2))
    assert not as_on_device(align_gradients, grads, references)[1]
