r"""Quantisers on a model that knows nothing of them: weights by parametrisation, inputs of layers by hooks; and off again.

    altgrad.quantize(model, weights="sign:reste", activations="sign:bireal")
    altgrad.dequantize(model)

A weight stays a real parameter, under `parametrizations.weight.original`; what the layer multiplies with is its quantised value. The model is changed
in place and is still the model: state dicts, deep copies, functional_call, vmap and forward mode go through it, and so does every engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from altgrad import registry
from altgrad.errors import CapabilityError, SettingError, UsageError, require
from altgrad.problem import Problem
from altgrad.quantisation import inputs as hooked
from altgrad.quantisation import layers as those
from altgrad.quantisation.layers import INPUT, WEIGHT, Layers, own_part, quantised
from altgrad.quantisation.quantisers import KINDS, of_weight
from altgrad.quantisation.specs import NONE, Spec, parsed
from altgrad.surrogates.estimator import setting

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Quantisation:
    """The settings of `quantize`, as the command line's --quantize NAME=VALUE gives them."""

    weights: str = setting(NONE, "of weights: none, or operation:estimator[,setting=value], as in sign:reste, ternary, uniform:lsq,bits=4")
    activations: str = setting(NONE, "the same of the inputs of the quantised layers")
    bits: int | None = setting(None, "of uniform, 1 to 8, where the text does not say; none for 8")
    per_channel: bool = setting(False, "a scale for every output channel of a weight, not one for the tensor")
    exempt: str = setting("first-last", "layers that stay as they are: first-last, first, last, none, or names and patterns with commas between")
    layers: str | None = setting(None, "names or patterns of the layers to quantise, with commas between; none for all that are not exempt")

    def __post_init__(self) -> None:
        weights, activations = self.specs()
        if weights is None and activations is None:
            raise SettingError("weights='none' with activations='none' leaves nothing to quantise; give one of them, for instance weights='sign:reste'.")
        if self.bits is not None and not any(spec is not None and spec.operation == "uniform" for spec in (weights, activations)):
            raise SettingError(f"bits={self.bits} is not allowed here: only the operation uniform has a choice of bits (weights='uniform').")
        require(isinstance(self.per_channel, bool), "per_channel", self.per_channel, "True or False")
        if self.per_channel and weights is None:
            raise SettingError("per_channel=True is not allowed with weights='none': the scales are the weights'.")

    def specs(self) -> tuple[Spec | None, Spec | None]:
        """What stands in the place of weights and inputs."""
        return parsed(self.weights, "weight", bits=self.bits), parsed(self.activations, "activation", bits=self.bits)

    def apply(self, model: Model, *, example: Any = None) -> Model:
        """As `quantize`."""
        weights, activations = self.specs()
        chosen = those.selected(model, layers=self.layers, exempt=self.exempt)
        refuse_twice(model, chosen, weights is not None)
        for layer in chosen.values():
            if weights is not None:
                parametrize.register_parametrization(layer, WEIGHT, of_weight(weights, layer.weight.detach(), per_channel=self.per_channel))  # type: ignore[operator]
            if activations is not None:
                hooked.put(layer, activations)
        if activations is not None and activations.operation == "sign":
            for module in those.rectifiers_before(model, chosen):
                hooked.silence(module)
        if example is not None and activations is not None:
            try:
                hooked.calibrate(model, example)
            except BaseException:
                dequantize(model)
                raise
        return model


def quantize(
    model: Model,
    *,
    weights: str = NONE,
    activations: str = NONE,
    bits: int | None = None,
    per_channel: bool = False,
    exempt: str | Sequence[str] = "first-last",
    layers: str | Sequence[str] | None = None,
    example: Any = None,
) -> Model:
    """Put quantisers on the linear and convolution layers of `model`, in place, and return it.

    Args:
        weights: what weights become: "none", or "<operation>:<estimator>[,setting=value]" with the operation sign, square-wave, ternary or uniform and
            a surrogate of altgrad.surrogates: "sign:reste", "square-wave:biper", "ternary", "uniform:round,bits=4,affine=true", "uniform:lsq".
        activations: the same for the inputs of the quantised layers. In front of a sign, modules such as nn.ReLU are passed over.
        bits: of uniform, 1 to 8, where the text does not say; None for 8.
        per_channel: a scale for every output of a weight instead of one for the tensor.
        exempt: "first-last", "first", "last", "none", names of modules or patterns of them ("head", "body.*"), or several of these.
        layers: names or patterns; only these layers are quantised. None for all that are not exempt.
        example: some inputs (tensor, tuple or dict), on which the model is run once: steps that are learned for inputs start from what they see, and a
            sign of numbers that are never negative is refused.

    Raises:
        UsageError: no such operation or estimator, an estimator of another operation, a pattern without a module, a model that is quantised already.
        SettingError: bits outside 1 to 8, a setting out of range, nothing to do. CapabilityError: no layer to quantise, or a named one has no weight.
    """
    joined = [value if value is None or isinstance(value, str) else ",".join(value) for value in (exempt, layers)]
    settings = Quantisation(weights, activations, bits, per_channel, joined[0] or "", joined[1])
    return settings.apply(model, example=example)


def dequantize(model: Model) -> Model:
    """Take the quantisers off `model`, in place, and return it: its weights are the real ones that were trained, under their first names.

    Raises:
        UsageError: there are none.
    """
    found = quantised(model)
    if not found:
        raise UsageError(f"{type(model).__name__} is not quantised; there is nothing to take off.")
    for layer in found.values():
        if own_part(layer) is not None:
            bare(layer)
        if hasattr(layer, INPUT):
            hooked.take_off(layer)
    for module in model.modules():
        if hooked.is_silent(module):
            hooked.wake(module)
    return model


def quantize_problem(problem: Problem, given: Mapping[str, Any]) -> None:
    """Quantise the model of a problem by settings as the command line gives them, calibrated on the problem's own example.

    Raises:
        SettingError: a name or value that `Quantisation` does not have. CapabilityError: the problem has no model. Otherwise as `quantize`.
    """
    settings = registry.build(Quantisation, given, "quantize")
    model = getattr(problem, "model", None)
    if not isinstance(model, nn.Module):
        raise CapabilityError(f"quantize={dict(given)} is not allowed: {type(problem).__name__} has no model whose layers could be quantised.")
    settings.apply(model, example=problem.example())


def bare(layer: nn.Module) -> None:
    """Give a layer its weight back as a plain parameter, which stays the same tensor."""
    lists: Any = layer.parametrizations
    if len(lists) > 1:  # another of its tensors has a parametrisation too
        parametrize.remove_parametrizations(layer, WEIGHT, leave_parametrized=False)
        return
    # Not by torch's removal, which deletes the weight from the layer's class: deep copies of the layer are of the same class.
    original = lists[WEIGHT].original
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    others = dict(layer._parameters)
    layer._parameters.clear()
    layer._parameters.update({WEIGHT: original, **others})


def refuse_twice(model: nn.Module, chosen: Layers, weights: bool) -> None:
    """Refuse what has quantisers already, or weights that are made of something else."""
    before = quantised(model)
    if before:
        names = ", ".join(repr(name) for name in before)
        raise UsageError(f"{type(model).__name__} is quantised already (layers {names}); take that off first: altgrad.dequantize(model).")
    for name, layer in chosen.items():
        if weights and parametrize.is_parametrized(layer, WEIGHT):
            kinds = ", ".join(type(part).__name__ for part in layer.parametrizations[WEIGHT] if not isinstance(part, KINDS))  # type: ignore[index]
            raise CapabilityError(f"the weight of layer {name!r} has another parametrisation ({kinds}); remove that first, or exempt the layer.")


__all__ = ["Quantisation", "dequantize", "quantize", "quantize_problem"]
