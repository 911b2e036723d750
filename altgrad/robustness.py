r"""What accuracy is left when every input takes the one step that its own gradient says is worst (fast gradient sign method, FGSM).

    x' = clip(x + ε (high - low) sign(∇ₓ L(f(x), y)), low, high)

ε is in units of the inputs' range: with low = 0 and high = 1, or for pixels that were standardised afterwards with their black and white as low and
high, it is the ε of Goodfellow et al. This is an evaluation, white box, and no training rule: the inputs' gradient is autograd's on the trained
model, whichever rule trained it. It is one attack, and a weak one: a model that stands it may fall to another.

Source: Goodfellow, Shlens, Szegedy, ICLR 2015, arXiv 1412.6572, section 4.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad.errors import CapabilityError, NumericsError, ShapeError, UsageError, require
from altgrad.problem import Problem
from altgrad.training import Training

Forward = Callable[[Tensor], Tensor]
Loss = Callable[[Any, Any], Tensor]
Bound = float | Tensor
CHUNK = 1000  # examples whose activations are in memory at once
SLACK = 1e-5  # of the range: standardised pixels leave it by rounding
FLAT = (
    "the model and its loss have no derivative that leads to the inputs, so FGSM has no direction to take, and the accuracy without an attack "
    "would pass for robustness. Give a loss with a derivative, such as cross entropy; a network of steps (hard signs, rounding) cannot be judged by FGSM."
)


class Attacked(NamedTuple):
    """What an attack leaves."""

    accuracy: float  # in [0, 1]
    unmoved: float  # share of examples whose gradient is zero, so that nothing was tried on them; not small: accuracy flatters the model


def fgsm(model_forward: Forward, inputs: Tensor, targets: Tensor, *, epsilon: float, loss: Loss, low: Bound = 0.0, high: Bound = 1.0) -> Tensor:
    r"""The inputs after the attack, x' = clip(x + ε (high - low) sign(∇ₓ L), low, high), of the inputs' shape.

    Args:
        model_forward: inputs [N, ...] -> outputs [N, classes], in evaluation mode.
        inputs: floating point [N, ...], in [low, high].
        targets: what `loss` takes.
        epsilon: largest change of an entry, as a share of high - low; 0 or more, 0.05 to 0.3 is usual for images.
        loss: (outputs, targets) -> a scalar or losses [N, ...], with a derivative.
        low, high: the ends of the inputs' range, numbers or tensors that broadcast against inputs (one entry a channel).

    Raises:
        SettingError: epsilon is negative or not finite.
        UsageError: inputs outside [low, high], where clipping would change them before any attack.
        CapabilityError: inputs that are no floating-point numbers, or a model or loss without a derivative (the gradient is zero everywhere).
        NumericsError: the gradient is NaN or infinite.
    """
    check(inputs, [epsilon], low, high)
    return moved(inputs, known(gradient(model_forward, inputs, targets, loss)), epsilon, low, high)


def accuracy_under_fgsm(
    model_forward: Forward, inputs: Tensor, targets: Tensor, *, epsilons: Sequence[float], loss: Loss, low: Bound = 0.0, high: Bound = 1.0
) -> dict[float, Attacked]:
    """epsilon -> the share of examples whose greatest output is still at targets [N] after `fgsm`.

    Args and errors as for `fgsm`. The gradient is taken once; epsilon = 0 gives the accuracy on the inputs as they are.
    """
    check(inputs, epsilons, low, high)
    parts = [(x, y) for x, y in zip(inputs.split(CHUNK), targets.split(CHUNK), strict=True)]
    slope = known(torch.cat([gradient(model_forward, x, y, loss) for x, y in parts]))
    unmoved = float((slope.flatten(1) == 0).all(1).double().mean())
    found = {}
    with torch.no_grad():
        for epsilon in epsilons:
            worst = moved(inputs, slope, epsilon, low, high)
            right = sum(float((model_forward(x).argmax(1) == y).sum()) for x, (_, y) in zip(worst.split(CHUNK), parts, strict=True))
            found[epsilon] = Attacked(right / len(inputs), unmoved)
    return found


def attack(training: Training, *, epsilons: Sequence[float]) -> dict[float, Attacked]:
    """`accuracy_under_fgsm` of a run on its problem's test set, by its engine's own read-out and its problem's own loss, the model in evaluation mode.

    Args:
        epsilons: shares of the range that the data set spans: for the image sets of altgrad.data, of the range from black to white.

    Raises:
        CapabilityError: a problem without a data set or without a derivative; and as for `fgsm`.
    """
    problem: Any = training.problem
    low, high = attackable(problem)
    dataset = problem.dataset
    mode = problem.model.training
    problem.model.eval()
    try:
        inputs, targets = dataset.test_inputs, dataset.test_targets
        return accuracy_under_fgsm(training.predict, inputs, targets, epsilons=epsilons, loss=problem.loss_function, low=low, high=high)
    finally:
        problem.model.train(mode)


def attackable(problem: Problem) -> tuple[Tensor, Tensor]:
    """The ends of the inputs' range; refuses what can be told before training to be out of reach of FGSM.

    Raises:
        CapabilityError: a problem without a test set of inputs and labels, without a derivative, or whose inputs are no floating-point numbers.
        UsageError: inputs of which a channel is constant.
    """
    dataset = getattr(problem, "dataset", None)
    if dataset is None:
        raise CapabilityError(f"problem {problem.name} has no test set of inputs and labels, so there is nothing to attack. Leave fgsm out.")
    if not problem.differentiable:
        raise CapabilityError(f"problem {problem.name}: {FLAT} Leave fgsm out.")
    low, high = span(dataset.train_inputs, dataset.test_inputs)
    check(dataset.test_inputs, (), low, high)
    return low, high


def span(*sets: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value in all of `sets` [N, ...], per channel where there are channels, in shapes that broadcast.

    Images are standardised by channel (altgrad.data), and every set of images has black and white pixels: its span is black and white, standardised.
    """
    ends = []
    for inputs in sets:
        axes = (0, *range(2, inputs.ndim)) if inputs.ndim > 2 else tuple(range(inputs.ndim))
        ends.append((inputs.amin(axes, keepdim=True), inputs.amax(axes, keepdim=True)))
    lows, highs = zip(*ends, strict=True)
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0)


def check(inputs: Tensor, epsilons: Sequence[float], low: Bound, high: Bound) -> None:
    """Refuse what `fgsm` refuses of its arguments."""
    for epsilon in epsilons:
        require(0 <= epsilon < float("inf"), "epsilon", epsilon, "a finite number, 0 or more (a share of the inputs' range)")
    if not inputs.is_floating_point():
        raise CapabilityError(f"inputs are {inputs.dtype}; FGSM moves inputs along a gradient, so they must be floating-point numbers.")
    if not len(inputs):
        raise ShapeError("inputs hold no example; FGSM needs at least one.")
    floor, ceiling = (torch.as_tensor(end, dtype=inputs.dtype, device=inputs.device) for end in (low, high))
    width = ceiling - floor
    if not bool((width > 0).all()):
        raise UsageError(f"low={shown(low)} and high={shown(high)} leave no range; low must be below high.")
    if bool((inputs < floor - SLACK * width).any() | (inputs > ceiling + SLACK * width).any()):
        raise UsageError(
            f"inputs run from {float(inputs.min()):.4g} to {float(inputs.max()):.4g}, outside [low, high] = [{shown(low)}, {shown(high)}], to which they "
            "would be clipped. Give low and high as the ends of their range: for pixels in [0, 1] standardised afterwards, -mean / std and (1 - mean) / std."
        )


def shown(bound: Bound) -> str:
    """A bound as text."""
    return f"{bound:.4g}" if not isinstance(bound, Tensor) else ", ".join(f"{float(entry):.4g}" for entry in bound.flatten()[:4])


def gradient(model_forward: Forward, inputs: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    """∇ₓ Σ L(f(x), y) [N, ...]; zeros where no derivative leads from the loss to the inputs."""
    x = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        try:
            outputs = model_forward(x)
            # In float64 softmax does not round a sure answer's probability to 1 as soon: rounded gradients make a model look robust.
            value = loss(outputs.double() if outputs.is_floating_point() else outputs, targets)
        except RuntimeError as error:
            if "requires grad" not in str(error):
                raise
            raise CapabilityError(f"{FLAT} PyTorch says: {error}") from error
        if not isinstance(value, Tensor) or not value.requires_grad:
            return torch.zeros_like(inputs)
        (found,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
    return torch.zeros_like(inputs) if found is None else found


def known(slope: Tensor) -> Tensor:
    """`slope`, if it is a direction.

    Raises:
        CapabilityError: it is zero everywhere. NumericsError: NaN or infinite entries.
    """
    wrong = int((~torch.isfinite(slope)).sum())
    if wrong:
        raise NumericsError(f"the gradient with respect to the inputs is NaN or infinite ({wrong} of {slope.numel()} entries). Has the run diverged?")
    if not bool(slope.any()):
        raise CapabilityError(f"the gradient with respect to the inputs is zero for all {len(slope)} examples: {FLAT}")
    return slope


def moved(inputs: Tensor, slope: Tensor, epsilon: float, low: Bound, high: Bound) -> Tensor:
    """The step itself."""
    floor, ceiling = (torch.as_tensor(end, dtype=inputs.dtype, device=inputs.device) for end in (low, high))
    return torch.clamp(inputs + epsilon * (ceiling - floor) * slope.sign(), floor, ceiling)


__all__ = ["Attacked", "accuracy_under_fgsm", "attack", "attackable", "fgsm", "span"]
