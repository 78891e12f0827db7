"""Records of next weights: kept, compared, and forgotten with their tensors."""

import gc

import pytest
import torch

from hyperfast.ops import next_weights
from hyperfast.ops.next_weights import is_current, record

LARGE = 300_000  # elements: above malloc's threshold for mmap, which reuses addresses at once


@pytest.fixture
def triple():
    return torch.randn(5, 3), torch.randn(5), torch.randn(3)


def test_current_until_something_changes(triple):
    buffer = torch.zeros(5)
    assert not is_current(buffer, *triple)
    record(buffer, *triple)
    assert is_current(buffer, *triple)
    assert is_current(buffer, triple[0].view_as(triple[0]), *triple[1:])  # the same memory, the same version
    for tensor in triple:
        tensor.add_(0)
        assert not is_current(buffer, *triple)
        record(buffer, *triple)


def test_swapped_tensors_are_noticed(triple):
    weight, bias, z = triple
    buffer, other = torch.zeros(5), torch.randn(5)
    record(buffer, weight, bias, z)
    assert not is_current(buffer, weight, other, z)
    assert not is_current(buffer, weight, None, z)
    assert not is_current(other, weight, bias, z)


def test_forgotten_with_the_buffer(triple):
    before = len(next_weights._records)
    buffer = torch.zeros(5)
    record(buffer, *triple)
    record(buffer, *triple)
    assert len(next_weights._records) == before + 1
    del buffer
    gc.collect()
    assert len(next_weights._records) == before


def test_a_new_buffer_at_a_reused_address_is_not_current(triple):
    """The allocator hands the address of a freed large buffer to the next one of its size."""
    reused = False
    for _ in range(10):
        buffer = torch.zeros(LARGE)
        record(buffer, *triple)
        address = buffer.data_ptr()
        del buffer
        buffer = torch.zeros(LARGE)
        reused |= buffer.data_ptr() == address
        assert not is_current(buffer, *triple)
    if not reused:
        pytest.skip("this allocator did not reuse the address")


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_new_parameter_at_a_reused_address_is_not_current(which):
    """A parameter is freed, another one of its size and version takes its memory."""
    buffer, reused = torch.zeros(5), False
    for _ in range(10):
        tensors = [torch.zeros(LARGE) for _ in range(3)]
        record(buffer, *tensors)
        address, version = tensors[which].data_ptr(), tensors[which]._version
        del tensors[which]
        tensors.insert(which, torch.zeros(LARGE))
        reused |= tensors[which].data_ptr() == address and tensors[which]._version == version
        assert not is_current(buffer, *tensors)
    if not reused:
        pytest.skip("this allocator did not reuse the address")


def test_records_do_not_keep_tensors_alive(triple):
    import weakref

    weight, bias, z = (t.clone() for t in triple)
    buffer = torch.zeros(5)
    record(buffer, weight, bias, z)
    alive = weakref.ref(weight)
    del weight
    gc.collect()
    assert alive() is None


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        triple = torch.randn(5, 3), torch.randn(5), torch.randn(3)
        buffer = torch.zeros(5)
        assert not is_current(buffer, *triple)
