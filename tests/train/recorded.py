"""A stand-in for a CUDA graph on the CPU: it records what torch's operators do, and does it again.

As in a graph, Python runs once, every operator works on the same memory at each replay, the capture itself
changes nothing, and whatever would make the host wait for a GPU is an error.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item")


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """Records operators, and what was in the memory they found."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before = [], set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        read = tensors((args, kwargs))
        for tensor in read:  # all of it: batch norm's schema does not say that it writes running statistics
            if storage(tensor) not in self.made:
                memory = tensor.untyped_storage()
                if memory.data_ptr() not in self.before:
                    self.before[memory.data_ptr()] = memory, memory.clone()
        out = func(*args, **kwargs)
        inputs = {storage(t) for t in read}
        fresh = [storage(t) not in inputs for t in tensors(out)]
        self.made |= {storage(t) for t, new in zip(tensors(out), fresh, strict=True) if new}
        self.calls.append((func, args, kwargs, tensors(out), fresh))
        return out


class RecordedGraph:
    """`train.graph.Recorder` without a GPU."""

    def __init__(self):
        self.captures = self.replays = 0

    def warm_up(self, work):
        return work()

    def capture(self, work):
        self.captures += 1
        chance = torch.get_rng_state()
        with Recording() as recording:
            result = work()
        with torch.no_grad():
            for memory, before in recording.before.values():
                memory.copy_(before)
            for _, _, _, out, fresh in recording.calls:
                for tensor, new in zip(out, fresh, strict=True):
                    if new and tensor.is_floating_point():
                        tensor.fill_(float("nan"))  # nothing has run yet
        torch.set_rng_state(chance)
        self.calls = recording.calls
        return result

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out, fresh in self.calls:
            again = tensors(func(*args, **kwargs))
            for tensor, value, new in zip(out, again, fresh, strict=True):
                if new:
                    tensor.copy_(value)
