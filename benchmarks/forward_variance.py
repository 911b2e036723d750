"""Figure 4: relative variance E‖ĝ - g‖²/‖g‖² of every estimator, beside its closed form.

    OMP_NUM_THREADS=1 python benchmarks/forward_variance.py [--out benchmarks/records/forward_variance.json]

The 3-layer MLP of the comparison: 32-48-48-10, tanh, no biases, d = 4,320 parameters, 106 units, one batch of 64, normal inputs, labels
from a random linear teacher. For a rank-r direction
A Bᵀ/√r of an m×n matrix with factors of fourth moment κ, and g spread over the layers l, the exact law is

    E‖ĝ‖²/‖g‖² = Σ_l (‖g_l‖²/‖g‖²) · ( [(m-1+κ)(n-1+κ) + (r-1)(mn+2)]/r + d - mn ),

which is d + 2 for r → ∞ with normal factors and d for signs at r = 1.
"""

import argparse
import itertools

import torch
import torch.nn.functional as F
from recording import record
from torch import nn

import altgrad
from altgrad import Batch, Key, World

SIZES, BATCH = (32, 48, 48, 10), 64


def build(generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(SIZES):
        layers += [nn.Linear(width, following, bias=False), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    for p in model.parameters():
        nn.init.normal_(p, std=p.shape[1] ** -0.5, generator=generator)
    return model


def relative_variance(model: nn.Module, x: torch.Tensor, y: torch.Tensor, exact: dict, draws: int, **settings) -> tuple[float, float]:
    """The variance of one direction (K times that of the mean of K), and its standard error."""
    learner = altgrad.Learner(model, F.cross_entropy, engine="forward", **settings)
    size = sum(float(g.double().square().sum()) for g in exact.values())
    errors = []
    for step in range(-(-draws // settings["tangents"])):
        found = learner.engine.estimate(learner.problem, learner.tensors(), learner.state, Batch(x, y), Key(7, step), World()).grads
        errors.append(sum(float((found[name] - g).double().square().sum()) for name, g in exact.items()) / size * settings["tangents"])
    values = torch.tensor(errors, dtype=torch.float64)
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def low_rank_law(model: nn.Module, exact: dict, rank: int, kappa: float) -> float:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    d = sum(shape.numel() for shape in shapes.values())
    share = {name: float(g.double().square().sum()) for name, g in exact.items()}
    whole = sum(share.values())
    return (
        sum(share[n] / whole * (((s[0] - 1 + kappa) * (s[1] - 1 + kappa) + (rank - 1) * (s.numel() + 2)) / rank + d - s.numel()) for n, s in shapes.items()) - 1
    )


def activation_law(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, exact: dict) -> float:
    """(1/N²) Σ_n Σ_l (n_l ‖δ_n‖² + ‖δ_nl‖²) ‖x_nl‖² / ‖g‖² with δ from backprop; normal noise, K = 1."""
    inputs, outputs, h = [], [], x
    for layer in model:
        if isinstance(layer, nn.Linear):
            inputs.append(h.detach())
            h = layer(h)
            h.retain_grad()
            outputs.append(h)
        else:
            h = layer(h)
    F.cross_entropy(h, y, reduction="sum").backward()
    deltas = [o.grad.double().square().sum(1) for o in outputs]
    everything = sum(deltas)
    total = sum(((o.shape[1] * everything + d) * i.double().square().sum(1)).sum() for o, d, i in zip(outputs, deltas, inputs, strict=True))
    return float(total) / len(x) ** 2 / sum(float(g.double().square().sum()) for g in exact.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--draws", type=int, default=60000)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    model = build(generator)
    x = torch.randn(BATCH, SIZES[0], generator=generator)
    y = (x @ torch.randn(SIZES[0], 10, generator=generator)).argmax(1)
    reference = altgrad.Learner(model, F.cross_entropy, engine="backprop")
    exact = dict(reference.engine.estimate(reference.problem, reference.tensors(), {}, Batch(x, y), Key(0), World()).grads)
    d = sum(p.numel() for p in model.parameters())
    cases = {
        "dense, normal": ({"space": "weights", "tangents": 64}, d + 1),
        "dense, signs": ({"space": "weights", "tangents": 64, "noise": "sign"}, d - 1),
        "rank 1, normal": ({"space": "weights", "tangents": 64, "rank": 1}, low_rank_law(model, exact, 1, 3.0)),
        "rank 1, signs": ({"space": "weights", "tangents": 64, "rank": 1, "noise": "sign"}, low_rank_law(model, exact, 1, 1.0)),
        "rank 4, normal": ({"space": "weights", "tangents": 64, "rank": 4}, low_rank_law(model, exact, 4, 3.0)),
        "activations, normal": ({"space": "activations", "tangents": 64}, activation_law(model, x, y, exact)),
    }
    rows = []
    for name, (settings, law) in cases.items():
        measured, error = relative_variance(model, x, y, exact, arguments.draws, **settings)
        rows.append({"estimator": name, "measured": measured, "standard_error": error, "closed_form": law, "ratio": measured / law})
        print(f"{name:22} {measured:9.1f} ± {error:6.1f}   closed form {law:9.1f}   ratio {measured / law:.3f}", flush=True)
    by = {row["estimator"]: row["measured"] for row in rows}
    print(f"rank 1 / dense: normal {by['rank 1, normal'] / by['dense, normal']:.3f}, signs {by['rank 1, signs'] / by['dense, signs']:.3f}; "
          f"weights / activations {by['dense, normal'] / by['activations, normal']:.1f}")  # fmt: skip
    record(arguments.out, {"net": SIZES, "batch": BATCH, "parameters": d, "draws": arguments.draws, "rows": rows})


if __name__ == "__main__":
    main()
