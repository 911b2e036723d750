r"""Variance, bias and memory of the likelihood ratio.

    OMP_NUM_THREADS=1 python benchmarks/likelihood_variance.py [--out benchmarks/records/likelihood_variance.json]

1. Relative variance E‖ĝ - g‖²/‖g‖² of one draw (one copy; one pair of antithetic copies) on the 3-layer MLP of forward_variance.py, σ = 0.1,
   beside the activation forward gradient's; and that law on networks of other seeds, between which it varies more than between these estimators.
2. Bias: one linear layer, losses Σ y² and Σ y³. The gradients of the smoothed losses are 2y and 3y² + 3σ² in y: the distance of the mean estimate
   from them in standard errors, and the bias against the plain gradient over 3σ².
3. Memory of one copy on an MLP of `depth` layers of 256 units, batch 512: bytes alive at the peak beyond parameters and gradients, over plain
   inference's; forward passes; whether store and replay agree bit for bit.
"""

import argparse

import forward_memory
import torch
import torch.nn.functional as F
from forward_variance import BATCH, SIZES, activation_law, build
from recording import record
from torch import nn

import altgrad
from altgrad import Batch, Key, World
from altgrad.metrics import live_bytes

ENGINES = {
    "likelihood ratio, none": ("likelihood-ratio", {"baseline": "none", "copies": 8}, 8, None),
    "clean baseline": ("likelihood-ratio", {"copies": 64}, 64, 95.0),
    "leave one out": ("likelihood-ratio", {"copies": 64, "baseline": "loo"}, 64, None),
    "antithetic": ("likelihood-ratio", {"copies": 64, "antithetic": True, "baseline": "none"}, 32, None),
    "antithetic, clean baseline": ("likelihood-ratio", {"copies": 64, "antithetic": True}, 32, 95.0),
    "quasi-random, 64 copies": ("likelihood-ratio", {"copies": 64, "qmc": True}, 64, None),
    "layer-wise": ("likelihood-ratio", {"copies": 64, "layerwise": True}, 64, 32.0),
    "activation forward gradient": ("forward", {"tangents": 64}, 64, None),
}


def estimates(model: nn.Module, loss, engine: str, settings: dict, batch: Batch, steps: int) -> tuple[torch.Tensor, float]:
    """Estimates at consecutive steps as vectors [steps, d], and forward passes a step."""
    learner = altgrad.Learner(model, loss, engine=engine, **settings)
    rows = []
    for step in range(steps):
        found = learner.engine.estimate(learner.problem, learner.tensors(), learner.state, batch, Key(7, step), World())
        rows.append(torch.cat([found.grads[name].double().flatten() for name in learner.tensors()]))
    return torch.stack(rows), float(found.metrics["forwards"])


def laws(seeds: range) -> list[float]:
    """The closed form of the activation forward gradient's relative variance on networks and data of other seeds: a property of the network."""
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        model = build(generator)
        x = torch.randn(BATCH, SIZES[0], generator=generator)
        y = (x @ torch.randn(SIZES[0], 10, generator=generator)).argmax(1)
        found.append(float(activation_law(model, x, y, learner_gradient(model, Batch(x, y)))))
    return found


def learner_gradient(model: nn.Module, batch: Batch) -> dict:
    learner = altgrad.Learner(model, F.cross_entropy, engine="backprop")
    return dict(learner.engine.estimate(learner.problem, learner.tensors(), {}, batch, Key(0), World()).grads)


def variance(draws: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    model = build(generator)
    x = torch.randn(BATCH, SIZES[0], generator=generator)
    y = (x @ torch.randn(SIZES[0], 10, generator=generator)).argmax(1)
    batch = Batch(x, y)
    gradient = learner_gradient(model, batch)
    exact = torch.cat([grad.double().flatten() for grad in gradient.values()])
    law = activation_law(model, x, y, gradient)
    print(f"closed form of the activation forward gradient on this network: {law:.1f}", flush=True)
    found = []
    for label, (engine, settings, directions, limit) in ENGINES.items():
        rows, forwards = estimates(model, F.cross_entropy, engine, settings, batch, -(-draws // directions))
        each = (rows - exact).square().sum(1) / exact.square().sum() * directions
        error = float(each.std() / len(each) ** 0.5)
        along = float((rows @ exact / exact.square().sum()).mean())
        row = {"estimator": label, "measured": float(each.mean()), "standard_error": error, "forwards_a_draw": forwards / directions}
        row |= {"limit": limit, "over_the_activation_law": row["measured"] / law}
        found.append(row)
        asked = f"   asked <= {limit:g}" if limit else ""
        print(f"{label:30} {row['measured']:9.1f} ± {error:6.1f}   {forwards / directions:5.2f} forwards a draw   along g {along:6.3f}{asked}", flush=True)
    return found


def bias(steps: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(3, 2).double()
    for p in layer.parameters():
        nn.init.normal_(p, generator=generator)
    x = torch.randn(6, 3, generator=generator).double()
    y = layer(x).detach()
    found = []
    for power in (2, 3):
        for sigma in (0.25, 0.5, 1.0):
            settings = {"copies": 4096, "antithetic": True, "sigma": sigma}
            rows = estimates(layer, lambda out, _, power=power: out.pow(power).sum(1), "likelihood-ratio", settings, Batch(x, x), steps)[0]
            delta = (2 * y if power == 2 else 3 * y.square() + 3 * sigma**2) / len(x)
            exact = torch.cat([(delta.T @ x).flatten(), delta.sum(0)])
            worst = float(((rows.mean(0) - exact).abs() / (rows.std(0) / steps**0.5)).max())
            plain = (power * y.pow(power - 1)).mean(0)
            ratio = float((rows[:, -2:].mean(0) - plain).mean() / (3 * sigma**2)) if power == 3 else float("nan")
            found.append({"loss": f"y^{power}", "sigma": sigma, "worst_in_standard_errors": worst, "bias_over_3_sigma_squared": None if power == 2 else ratio})
            print(f"y^{power}, sigma {sigma:4}: worst of 8 elements {worst:4.2f} standard errors off; bias / 3σ² {ratio:6.3f}", flush=True)
    return found


def memory() -> list[dict]:
    x, y = torch.randn(forward_memory.BATCH, forward_memory.WIDTH), torch.randint(forward_memory.CLASSES, (forward_memory.BATCH,))
    found = []
    for depth in (8, 32):
        model = forward_memory.build(depth)
        with torch.no_grad(), live_bytes() as plain:
            model(x)
        grads = {}
        for mode, limit in (("store", None), ("replay", 2.2)):
            learner = altgrad.Learner(model, F.cross_entropy, engine="likelihood-ratio", copies=1, memory=mode)
            learner.backward(x, y)
            for leaf in learner.parameters():
                leaf.grad = None
            learner.at = 0
            with live_bytes() as live:
                report = learner.backward(x, y)
            grads[mode] = [leaf.grad.clone() for leaf in learner.parameters()]
            ratio = live.peak_without(leaf.grad for leaf in learner.parameters()) / plain.peak
            forwards = float(report.metrics["forwards"])
            found.append({"depth": depth, "memory": mode, "ratio_to_inference": ratio, "forwards": forwards, "limit": limit})
            print(f"depth {depth:3}, {mode:6}: {ratio:6.2f} × inference, {forwards:g} forwards" + (f"   asked <= {limit}" if limit else ""), flush=True)
        same = all(torch.equal(one, other) for one, other in zip(grads["store"], grads["replay"], strict=True))
        print(f"depth {depth:3}: store and replay agree bit for bit: {same}")
        found.append({"depth": depth, "bits_equal": same})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--draws", type=int, default=6400)
    parser.add_argument("--steps", type=int, default=100, help="estimates of 2,048 pairs each that the bias is measured from")
    arguments = parser.parse_args()
    figures = {"variance": variance(arguments.draws), "activation_laws_of_12_networks": laws(range(12)), "bias": bias(arguments.steps), "memory": memory()}
    record(arguments.out, {"draws": arguments.draws, **figures})


if __name__ == "__main__":
    main()
