"""The padding of gradient buckets, which megatron-core's distributed optimizer miscounts when it lists its state.

It packs the state of all buckets end to end without the padding that rounds each bucket up for the data-parallel ranks,
then cuts out each parameter at its offset in the buffer, which counts that padding (0.16.1 and 0.19.2 alike). Every
parameter behind a padded bucket is so given the state of its neighbours.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


class PaddedBucketsOptimizer(DistributedOptimizer):  # type: ignore[misc]
    """megatron-core's distributed optimizer, which lists each parameter's own state whatever the buckets are."""

    def sharded_param_state_fully_reshardable(self, *args: Any, **kwargs: Any) -> Any:
        """List main weights and moments by parameter.

        Collective: every rank of the data-parallel group calls it.
        """
        with _padding_packed(self.buffers):
            return super().sharded_param_state_fully_reshardable(*args, **kwargs)


@contextlib.contextmanager
def _padding_packed(buffers: Iterable[Any]) -> Iterator[None]:
    """Have padding packed like content: an offset in a buffer is then an offset in what is packed.

    A version that subtracts the padding from the offsets finds none, so it is served as well.
    """
    parts = [part for buffer in buffers for part in (buffer, *buffer.buckets)]
    unpadded = [part.numel_unpadded for part in parts]
    for part in parts:
        part.numel_unpadded = part.grad_data.numel()
    try:
        yield
    finally:
        for part, numel in zip(parts, unpadded, strict=True):
            part.numel_unpadded = numel
