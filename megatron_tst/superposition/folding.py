"""Fold sequences of data tokens into bags, and their labels into bags of targets.

Shape letters: B sequences, T data tokens, S bag size, L = T / S positions.
"""

import torch
from torch import Tensor


def fold_tokens(tokens: Tensor, bag_size: int) -> Tensor:
    """Split each sequence into contiguous, non-overlapping bags.

    Args:
        tokens: ``[B, T]`` integers; T must be a multiple of ``bag_size``.
        bag_size: S, at least 1.

    Returns:
        ``[B, L, S]``, a view: position j holds the tokens jS .. jS+S-1.

    Raises:
        ValueError: if ``bag_size`` is below 1 or does not divide T.
    """
    if bag_size < 1:
        raise ValueError(f"bag_size is {bag_size}; it must be at least 1")
    if tokens.shape[1] % bag_size:
        raise ValueError(f"{tokens.shape[1]} tokens per sequence do not fold into bags of bag_size {bag_size}")
    return tokens.reshape(tokens.shape[0], -1, bag_size)


def fold_labels(labels: Tensor, bag_size: int, ignore_index: int = -100) -> Tensor:
    """Fold next-token labels so that each position's targets are the next bag.

    ``labels[:, t]`` is the token after token t, so the tokens of bag j+1 are the labels (j+1)S-1 .. (j+2)S-2:
    a shift by S-1 to the left aligns them with bag j. The vacated tail is filled with ``ignore_index``; the last
    position keeps one valid target, the token after the sequence.

    Args:
        labels: ``[B, T]`` integers; T must be a multiple of ``bag_size``.
        bag_size: S, at least 1. With 1 the labels are not shifted.
        ignore_index: value of targets that contribute neither loss nor gradient.

    Returns:
        ``[B, L, S]``: the targets of position j, in reading order.

    Raises:
        ValueError: if ``bag_size`` is below 1 or does not divide T.
    """
    shifted = torch.nn.functional.pad(labels[:, bag_size - 1 :], (0, bag_size - 1), value=ignore_index)
    return fold_tokens(shifted, bag_size)


def slide_labels(labels: Tensor, bag_size: int, ignore_index: int = -100) -> Tensor:
    """Give each single token the next S tokens as targets: superposition of the output only.

    Args:
        labels: ``[B, L]`` integers, next-token labels.
        bag_size: S, at least 1.
        ignore_index: value of targets beyond the end of the sequence.

    Returns:
        ``[B, L, S]``: position j predicts the labels j .. j+S-1, in reading order.
    """
    padded = torch.nn.functional.pad(labels, (0, bag_size - 1), value=ignore_index)
    return padded.unfold(1, bag_size, 1)
