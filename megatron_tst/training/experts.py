"""Counts the positions that each expert computes and the choices that the router makes."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_tst.distributed import ParallelState
from megatron_tst.telemetry import ExpertMetrics


@dataclass(frozen=True)
class ExpertCounts:
    """Routing decisions of all layers and ranks.

    Attributes:
        taken: ``[layers, experts]`` int64, number of positions that each expert computed.
        chosen: ``[layers]`` int64, number of choices that the router made: positions x experts per position.
    """

    taken: Tensor
    chosen: Tensor

    def metrics(self, step: int) -> ExpertMetrics:
        """Return the metric line of the experts' load, where 1 is the mean of a layer."""
        load_LE = self.taken / self.taken.double().mean(dim=1, keepdim=True)
        dropped_L = 1 - self.taken.sum(dim=1) / self.chosen.double()
        return ExpertMetrics(step, load_LE.amax(dim=1).tolist(), load_LE.amin(dim=1).tolist(), dropped_L.tolist())


class ExpertCounter:
    """Counts, per layer, the positions that the router sends to each expert during training."""

    def __init__(self, chunks: list[torch.nn.Module], num_layers: int, num_experts: int, ranks: ParallelState) -> None:
        """Register a hook on every router of this rank's model chunks.

        Args:
            chunks: this rank's model chunks.
            num_layers: number of layers of the whole model.
            num_experts: number of experts per layer.
            ranks: parallel state of this rank.
        """
        self._groups = ranks.groups
        # The last column counts the choices.
        device = torch.cuda.current_device()
        self._counts_LE = torch.zeros(num_layers, num_experts + 1, dtype=torch.int64, device=device)
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(partial(self._count, module.layer_number - 1))

    def _count(self, layer: int, router: TopKRouter, _: Any, output: tuple[Tensor, Tensor]) -> None:
        if router.training:
            _, routing_map = output
            self._counts_LE[layer, :-1] += routing_map.sum(dim=0)
            self._counts_LE[layer, -1] += routing_map.shape[0] * router.topk

    def take(self) -> ExpertCounts:
        """Return the counts of all ranks since the last call.

        With full recomputation each position counts twice. Collective: every rank of the world calls it.
        """
        counts_LE = self._counts_LE.clone()
        dist.all_reduce(counts_LE, group=self._groups.tp_dp_cp)
        dist.all_reduce(counts_LE, group=self._groups.pp)
        self._counts_LE.zero_()
        return ExpertCounts(counts_LE[:, :-1], counts_LE[:, -1])
