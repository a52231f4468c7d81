"""The method as loops over single targets in float64, with which every implementation is compared."""

import math

import torch


def targets_of_text(text: list[int], bag_size: int, ignore: int = -100) -> list[list[int]]:
    """Return the targets of each position: position j predicts bag j+1, and tokens beyond the text are ignored."""
    positions = (len(text) - 1) // bag_size
    place = lambda j, i: (j + 1) * bag_size + i  # noqa: E731
    return [
        [text[place(j, i)] if place(j, i) < len(text) else ignore for i in range(bag_size)] for j in range(positions)
    ]


def weight_formula(name: str, i: int) -> float:
    return {
        "uniform": 1.0,
        "power_law": 1 / i,
        "exponential": math.exp(-i),
        "first_token": float(i == 1),
        "mutual_information": 3.63 + 1.35 * i**-1.25,
    }[name]


def loss_and_gradient(logits, targets, weights, ignore: int = -100):
    """Compute row losses, row weights and the gradient of the summed loss, target by target."""
    z = logits.double()
    loss = torch.zeros(z.shape[:-1], dtype=torch.float64)
    row_weight = torch.zeros_like(loss)
    gradient = torch.zeros_like(z)
    for row in torch.cartesian_prod(*(torch.arange(n) for n in z.shape[:-1])).reshape(-1, z.dim() - 1).tolist():
        row = tuple(row)
        probabilities = torch.softmax(z[row], dim=-1)
        for target, weight in zip(targets[row].tolist(), weights.double().tolist(), strict=True):
            if target == ignore or weight == 0:
                continue
            loss[row] += weight * (torch.logsumexp(z[row], dim=-1) - z[row][target])
            row_weight[row] += weight
            gradient[row] += weight * probabilities
            gradient[row][target] -= weight
    return loss, row_weight, gradient


def edge_targets(shape: tuple[int, ...], vocab: int, bag_size: int, seed: int = 0):
    """Return random targets with edge cases: duplicates, first ignored, all ignored, only the first valid."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocab, (*shape, bag_size), generator=generator)
    rows = targets.view(-1, bag_size)
    rows[0] = rows[0, 0]
    rows[1, 0] = -100
    rows[2] = -100
    rows[3, 1:] = -100
    rows[4] = torch.tensor([vocab - 1, 0] * bag_size)[:bag_size]
    return targets


def mass_loss_and_gradient(logits, targets, ignore: int = -100):
    """Compute MCEAlt row by row: minus the log of the total probability of the bag's distinct tokens."""
    z = logits.double().detach().requires_grad_()
    loss = torch.zeros(z.shape[:-1], dtype=torch.float64)
    row_weight = torch.zeros_like(loss)
    for row in torch.cartesian_prod(*(torch.arange(n) for n in z.shape[:-1])).reshape(-1, z.dim() - 1).tolist():
        row = tuple(row)
        distinct = sorted({target for target in targets[row].tolist() if target != ignore})
        if distinct:
            loss[row] = -torch.softmax(z[row], dim=-1)[distinct].sum().log()
            row_weight[row] = 1.0
    loss.sum().backward()
    return loss.detach(), row_weight, z.grad
