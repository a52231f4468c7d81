"""How many bytes of tensors are alive, counted while operations run."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the storages that operations make, from their first sight to their end; ``peak`` is in bytes."""

    def __init__(self, held=()):
        """Storages of the tensors in ``held`` are there before and do not count."""
        super().__init__()
        self.alive, self.peak = 0, 0
        self._known = set()
        for tensor in held:
            self._meet(tensor.untyped_storage(), size=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf.untyped_storage(), leaf.untyped_storage().nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _meet(self, storage, size):
        """Count a storage the first time; its address may be another storage's once it is gone."""
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.alive += size
            weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, address, size):
        self._known.discard(address)
        self.alive -= size
