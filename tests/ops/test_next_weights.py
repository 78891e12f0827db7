"""Records of next weights: kept, compared, and forgotten with their tensors."""

import gc

import pytest
import torch

from hyperfast.ops import next_weights
from hyperfast.ops.next_weights import is_current, record


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


def at(memory):
    """A new tensor at the address of `memory`, a bytearray, as when an allocator reuses an address."""
    return torch.frombuffer(memory, dtype=torch.float32)


def test_a_new_buffer_at_a_reused_address_is_not_current(triple):
    memory = bytearray(20)
    buffer = at(memory)
    record(buffer, *triple)
    address = buffer.data_ptr()
    del buffer
    buffer = at(memory)
    assert buffer.data_ptr() == address
    assert not is_current(buffer, *triple)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_new_parameter_at_a_reused_address_is_not_current(which):
    """A parameter is freed, another one of its size and version takes its memory."""
    buffer, memory = torch.zeros(5), bytearray(20)
    tensors = [torch.zeros(5) for _ in range(3)]
    tensors[which] = at(memory)
    record(buffer, *tensors)
    assert is_current(buffer, *tensors)
    address, version = tensors[which].data_ptr(), tensors[which]._version
    del tensors[which]
    tensors.insert(which, at(memory))
    assert tensors[which].data_ptr() == address and tensors[which]._version == version
    assert not is_current(buffer, *tensors)


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
