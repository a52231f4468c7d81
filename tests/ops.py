"""Record the tensor operations that a piece of code runs."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OperationLog(TorchDispatchMode):
    """Counts operations by name and records the size of the largest tensor that any of them returned."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.counts[func.overloadpacket.__name__] += 1
        sizes = [leaf.numel() for leaf in tree_leaves(result) if hasattr(leaf, "numel")]
        self.largest = max([self.largest, *sizes])
        return result
