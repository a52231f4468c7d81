"""The distributed optimizer's state in checkpoints: one rank saves and loads the whole state of a parameter.

megatron-core's distributed optimizer splits its state at the boundaries of its buffers' shards, but a checkpoint that
any layout can load stores it parameter by parameter. megatron-core therefore gathers the whole state on every
data-parallel rank. Here each parameter has one keeper among those ranks: the keeper receives the pieces before a save
and sends them after a load, so that a rank holds in host memory only what it writes or reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

# Adam's float32 state of a parameter: the main weights and the two moments.
STATES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Placement:
    """How a parameter's state is distributed over the ranks that share it.

    Attributes:
        parameter: the model's parameter.
        keeper: the rank that writes and reads the whole state.
        pieces: start and end of each rank's piece, in elements of the flattened parameter.
    """

    parameter: Tensor
    keeper: int
    pieces: dict[int, tuple[int, int]]


class KeptStateOptimizer(DistributedOptimizer):  # type: ignore[misc]
    """megatron-core's distributed optimizer with one keeper per parameter that saves and loads its state."""

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[int, dict[str, Any]]:
        """Return the shards of the state that this rank keeps.

        Collective: every rank of the data-parallel group calls it.

        Args:
            model_sharded_state_dict: the model's shards, whose shapes the state's shards have.
            is_loading: whether the state is about to be loaded, in which case nothing is gathered.
            metadata: ignored; keys and shapes are those of megatron-core's ``fully_reshardable`` format.
        """
        dist.barrier(self.data_parallel_group)
        model_shards, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        shard_of = {shard.data: shard for shard in nested_values(model_shards)}
        listed: dict[int, dict[str, Any]] = {}
        for index, place in enumerate(self._placements()):
            shard = shard_of[place.parameter]
            # The last number distinguishes data-parallel copies, of which only the keeper's exists.
            replica_id = (*shard.replica_id[:-1], 0)
            if is_loading:
                tensors = self._empty(place)
            elif is_main_replica(replica_id):
                tensors = self._gather(place)
            else:  # saved by another tensor-parallel rank or pipeline stage
                continue
            if tensors:
                listed[index] = {name: _like(shard, name, tensor, replica_id) for name, tensor in tensors.items()}
        return listed

    def load_parameter_state_from_fully_reshardable(self, state_dict: dict[int, dict[str, Tensor]]) -> None:
        """Distribute the state that each keeper has loaded.

        Collective: every rank of the data-parallel group calls it.
        """
        dist.barrier(self.data_parallel_group)
        for index, place in enumerate(self._placements()):
            tensors = self._scatter(place, state_dict.get(index))
            if tensors:
                self._set_main_param_and_optimizer_states(place.parameter, tensors)

    def _placements(self) -> Iterator[_Placement]:
        """Yield the placement of each parameter's state, which is the same on every rank of the data-parallel group."""
        group_size = self.data_parallel_group.size()
        found = [(parameter, buffer) for buffer in self.buffers for parameter in buffer.param_index_map]
        kept = [0] * group_size
        keepers = {}
        for parameter, _ in sorted(found, key=lambda pair: -pair[0].numel()):
            keeper = kept.index(min(kept))
            keepers[parameter] = keeper
            kept[keeper] += parameter.numel()
        for parameter, buffer in found:
            yield _Placement(parameter, keepers[parameter], _pieces(buffer, parameter, group_size))

    def _empty(self, place: _Placement) -> dict[str, Tensor]:
        """Return uninitialised host tensors for a parameter's state on its keeper, and nothing on other ranks."""
        if place.keeper != self.data_parallel_group.rank():
            return {}
        return {name: torch.empty(place.parameter.numel(), dtype=torch.float32, device="cpu") for name in STATES}

    def _gather(self, place: _Placement) -> dict[str, Tensor]:
        """Return a parameter's whole state on its keeper, without a copy if it is there already, nothing elsewhere."""
        own_rank, device = self.data_parallel_group.rank(), place.parameter.device
        own = self._own_piece(place) if own_rank in place.pieces else {}
        if place.keeper != own_rank:
            self._exchange([(own[name], place.keeper) for name in own], [])
            return {}
        if len(place.pieces) == 1 and own:
            return own
        whole = {name: torch.empty(place.parameter.numel(), dtype=torch.float32, device=device) for name in STATES}
        slots = {rank: {name: whole[name][slice(*span)] for name in STATES} for rank, span in place.pieces.items()}
        self._exchange([], [(slots[rank][name], rank) for rank in slots if rank != own_rank for name in STATES])
        for name in own:
            slots[own_rank][name].copy_(own[name])
        return {name: tensor.cpu() for name, tensor in whole.items()}

    def _scatter(self, place: _Placement, loaded: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Return this rank's piece of a parameter's state, or nothing if it has none.

        Args:
            place: the placement of the parameter's state.
            loaded: the whole state on the keeper, None on other ranks.
        """
        own_rank, device = self.data_parallel_group.rank(), place.parameter.device
        if loaded is None:
            if own_rank not in place.pieces:
                return {}
            start, end = place.pieces[own_rank]
            own = {name: torch.empty(end - start, dtype=torch.float32, device=device) for name in STATES}
            self._exchange([], [(own[name], place.keeper) for name in STATES])
            return own
        whole = {name: loaded[name].flatten() for name in STATES}
        pieces = {rank: {name: whole[name][slice(*span)] for name in STATES} for rank, span in place.pieces.items()}
        self._exchange(
            [(pieces[rank][name].to(device), rank) for rank in pieces if rank != own_rank for name in STATES], []
        )
        return pieces.get(own_rank, {})

    def _own_piece(self, place: _Placement) -> dict[str, Tensor]:
        tensors = self._get_main_param_and_optimizer_states(place.parameter)
        return {name: tensors[name].detach().float() for name in STATES}

    def _exchange(self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]) -> None:
        """Send tensors to and receive tensors from ranks of the data-parallel group, and wait for all of them."""
        group = self.data_parallel_group
        operations = [
            dist.P2POp(operation, tensor, dist.get_global_rank(group, peer), group)
            for operation, transfers in ((dist.isend, sends), (dist.irecv, receives))
            for tensor, peer in transfers
        ]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()


def _pieces(buffer: Any, parameter: Tensor, group_size: int) -> dict[int, tuple[int, int]]:
    """Return a parameter's pieces; a bucket, including its padding, is split into equal shards, one per rank."""
    start, end, bucket_index = buffer.param_index_map[parameter]
    bucket = buffer.buckets[bucket_index]
    shard = bucket.grad_data.numel() // group_size
    ranks = range((start - bucket.offset) // shard, (end - 1 - bucket.offset) // shard + 1)
    bounds = {rank: bucket.offset + rank * shard for rank in ranks}
    return {rank: (max(low, start) - start, min(low + shard, end) - start) for rank, low in bounds.items()}


def _like(shard: Any, name: str, tensor: Tensor, replica_id: tuple[int, ...]) -> Any:
    """Return a shard of a parameter's state with the same offsets as the parameter's own shard."""
    changes: dict[str, Any] = {"key": f"optimizer.state.{name}.{shard.key}", "data": tensor.view(shard.data.shape)}
    if not isinstance(shard, ShardedTensorFactory):
        changes["dtype"] = tensor.dtype
    return replace(shard, **changes, replica_id=replica_id)
