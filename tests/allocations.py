"""Measure the bytes of live tensors while operations run."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the storages that operations create, from their first appearance to their end; ``peak`` is in bytes."""

    def __init__(self, held=()):
        """Exclude the storages of the tensors in ``held``, which exist already."""
        super().__init__()
        self.alive, self.peak = 0, 0
        self._spans = {}
        for tensor in held:
            self._meet(tensor.untyped_storage(), is_new=False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf.untyped_storage())
        self.peak = max(self.peak, self.alive)
        return result

    def _meet(self, storage, is_new=True):
        """Count a storage when it first appears; a later storage may have the same address."""
        if storage._cdata not in self._spans:
            start, size = storage.data_ptr(), storage.nbytes()
            # A storage may be part of another one's memory.
            is_part = any(low <= start < high for low, high in self._spans.values())
            self._spans[storage._cdata] = (start, start + size)
            counted = size if is_new and not is_part else 0
            self.alive += counted
            weakref.finalize(storage, self._forget, storage._cdata, counted)

    def _forget(self, address, size):
        self._spans.pop(address, None)
        self.alive -= size
