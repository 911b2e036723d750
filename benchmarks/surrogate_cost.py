"""What a surrogate derivative costs: the time of a training step and of the bare operation beside clipped straight-through, and bytes saved.

    OMP_NUM_THREADS=1 python benchmarks/surrogate_cost.py [--short] [--out benchmarks/records/surrogate_cost.json]

Step: forward and backward of 1,024 inputs through 256-1024-1024-10, batch norm and a sign before every layer behind the first, float32, one thread,
without an optimizer. Bare: forward and backward of the operation alone on a million numbers. Times are seconds of the processor's, the medians of rounds
in which all estimators take turns; a ratio is the median of the quotients round by round. Bytes are those that autograd keeps for the backward sweep of the
bare operation, in tensors of the input's size; `detach form` is the same ReSTE written as f(x) + (q(x) - f(x)).detach().
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from recording import interleaved, ratio, record
from torch import Tensor, nn

from altgrad import surrogates
from altgrad.metrics import saved_bytes
from altgrad.surrogates.modules import SignActivation

REFERENCE = "clipped"


def network(name: str, width: int) -> nn.Sequential:
    """256-width-width-10."""
    layers: list[nn.Module] = []
    for inner, outer in ((256, width), (width, width)):
        layers += [nn.Linear(inner, outer), nn.BatchNorm1d(outer), SignActivation(name)]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def detach_form(x: Tensor) -> Tensor:
    """ReSTE with o = 2 as published code often writes such estimators."""
    soft = torch.where(x.abs() <= 0.1, x * 0.1**-0.5, x.sign() * x.abs().clamp(0.1, 1.5).pow(0.5))
    return soft + (surrogates.sign(x) - soft).detach()


def saved(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Tensors of the size of `x` kept for the backward sweep."""
    mine = x * 1.0
    with saved_bytes() as meter:
        kept = call(mine)
    del kept
    return meter.peak / (x.numel() * x.element_size())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=None)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--short", action="store_true", help="small sizes, to see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    width, examples, numbers = (64, 64, 10_000) if arguments.short else (1024, 1024, 1_000_000)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(examples, 256, generator=generator), torch.arange(examples) % 10
    x = torch.randn(numbers, generator=generator, requires_grad=True)
    names = surrogates.names("pointwise", operation="sign")
    models = {name: network(name, width) for name in names}

    def step(model: nn.Module) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(F.cross_entropy(model(inputs), targets), list(model.parameters()))

    def bare(call: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(x).sum(), x)

    steps = interleaved({name: step(model) for name, model in models.items()}, arguments.repeats)
    alone = interleaved({name: bare(surrogates.get(name)) for name in names}, arguments.repeats)
    rows = [
        {
            "estimator": name,
            "step_seconds": statistics.median(steps[name]),
            "step_ratio": ratio(steps[name], steps[REFERENCE]),
            "bare_seconds": statistics.median(alone[name]),
            "bare_ratio": ratio(alone[name], alone[REFERENCE]),
            "saved_tensors": saved(surrogates.get(name), x),
        }
        for name in names
    ]
    print(f"{'estimator':<14}{'step, ms':>10}{'ratio':>8}{'bare, ms':>10}{'ratio':>8}{'saved':>7}")
    for row in rows:
        times = (1e3 * row["step_seconds"], row["step_ratio"], 1e3 * row["bare_seconds"], row["bare_ratio"])
        print(f"{row['estimator']:<14}{times[0]:>10.2f}{times[1]:>8.3f}{times[2]:>10.3f}{times[3]:>8.2f}{row['saved_tensors']:>7.2f}")
    detached = saved(detach_form, x)
    print(f"ReSTE in detach form saves {detached:.2f} tensors")
    record(
        arguments.out, {"reference": REFERENCE, "width": width, "examples": examples, "numbers": numbers, "rows": rows, "detach_form_saved_tensors": detached}
    )


if __name__ == "__main__":
    main()
