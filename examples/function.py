"""Minimise a scalar function of a dict of tensors by estimates of its gradient, without a network or a loader. Takes a few seconds."""

import torch

import altgrad


def rosenbrock(point: dict[str, torch.Tensor]) -> torch.Tensor:
    """(1 - x)² + 10 (y - x²)², least at x = y = 1."""
    return (1 - point["x"]) ** 2 + 10 * (point["y"] - point["x"] ** 2) ** 2


estimate = altgrad.grad(rosenbrock, engine="forward", space="weights", tangents=4)
point = {"x": torch.tensor(-1.0), "y": torch.tensor(1.0)}
optimizer = torch.optim.Adam(point.values(), lr=0.1)
for step in range(200):
    gradient = estimate(point, key=altgrad.Key(0, step))  # the key is the address of the noise: the same key, the same estimate
    for name, tensor in point.items():
        tensor.grad = gradient[name]
    optimizer.step()
print({name: round(float(tensor), 3) for name, tensor in point.items()}, f"f = {float(rosenbrock(point)):.6f}")
