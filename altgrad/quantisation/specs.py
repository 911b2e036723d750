"""What stands in the place of a weight or an input, as text: "sign:reste,o=2", "ternary", "uniform:lsq,bits=4", "none"."""

from dataclasses import dataclass, fields
from typing import Any

from altgrad import registry, surrogates
from altgrad.errors import SettingError, UsageError, near_miss, require
from altgrad.surrogates import Pointwise
from altgrad.surrogates.learned import LSQ, LSQPlus
from altgrad.surrogates.levels import DSQ, Round

NONE = "none"
ROLES = ("weight", "activation")
OPERATIONS = {"sign": 1, "square-wave": 1, "ternary": 2, "uniform": 8}  # bits a number where nothing else is said
DEFAULTS = {("sign", "weight"): "clipped", ("sign", "activation"): "bireal", "square-wave": "biper", "ternary": "ternary", "uniform": "round"}


@dataclass(frozen=True)
class Spec:
    """An operation with its estimator; `affine` is whether the levels of uniform:round begin at the least value, not evenly around 0."""

    operation: str
    estimator: Pointwise | LSQ
    bits: int
    affine: bool = False

    def __str__(self) -> str:
        estimator = self.estimator
        changed = {entry.name: getattr(estimator, entry.name) for entry in fields(estimator) if getattr(estimator, entry.name) != entry.default}
        if self.operation == "uniform":
            changed = {name: value for name, value in changed.items() if name not in {"low", "high"}} | {"bits": self.bits}
        pairs = [f"{name}={value}" for name, value in (changed | ({"affine": True} if self.affine else {})).items()]
        return f"{self.operation}:{','.join([estimator.name, *pairs])}"


def fitting(operation: str) -> list[str]:
    """The estimators that serve an operation."""
    return ["round", "dsq", "lsq", "lsq-plus"] if operation == "uniform" else surrogates.names("pointwise", operation=operation)


def parsed(text: str, role: str, *, bits: int | None = None) -> Spec | None:
    """What `text` says, None for "none".

    Args:
        text: "<operation>[:<estimator>[,setting=value…]]"; operations are sign, square-wave (weights only), ternary and uniform.
        role: "weight" or "activation".
        bits: of uniform, 1 to 8, where the text does not say; 8.

    Raises:
        UsageError: no such operation or estimator, or an estimator of another operation. SettingError: bits outside 1 to 8, and settings of the estimator.
    """
    name = "weights" if role == "weight" else "activations"
    if bits is not None:
        whole_bits(bits)
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f'{name}={text!r} is not allowed; write it as "sign:reste", "uniform:lsq,bits=4" or "none".')
    operation, _, rest = text.strip().partition(":")
    if operation == NONE:
        return None
    if operation not in OPERATIONS:
        raise UsageError(f"{name}: " + near_miss("operation", operation, [*OPERATIONS, NONE]) + ' Write it as "sign:reste" or "uniform:lsq,bits=4".')
    if operation == "square-wave" and role == "activation":
        raise UsageError("activations='square-wave' is not allowed: the square wave of BiPer is for weights. Take sign, ternary or uniform.")
    short, *pairs = (part.strip() for part in rest.split(","))
    short = short or str(DEFAULTS.get(operation, DEFAULTS.get((operation, role))))  # type: ignore[call-overload]
    if short not in surrogates.TABLE:
        raise UsageError(f"{name}={text!r}: " + near_miss("surrogate", short, fitting(operation)))
    if short not in fitting(operation):
        raise UsageError(f"{name}={text!r}: surrogate {short!r} is not for {operation}; those that fit: {', '.join(fitting(operation))}.")
    settings = registry.split_pairs(pairs)
    if operation == "uniform":
        return uniform(text, short, settings, 8 if bits is None else bits)
    found = surrogates.get(short, **settings)
    if found.operation != operation:
        raise UsageError(f"{name}={text!r}: with these settings {short} is not for {operation} but for {found.operation}.")
    return Spec(operation, found, OPERATIONS[operation])


def uniform(text: str, short: str, settings: dict[str, Any], bits: int) -> Spec:
    """Evenly spaced levels: 2^bits of them, or where they lie evenly around 0 one less."""
    bits = whole_bits(settings.pop("bits", bits))
    if short in {"lsq", "lsq-plus"}:
        learned = surrogates.get(short, bits=bits, **settings)
        return Spec("uniform", learned, bits)
    if short == "dsq":
        if {"low", "high"} & set(settings):
            raise SettingError(f"{text!r}: low and high are not allowed here; the levels span the largest |x|.")
        return Spec("uniform", surrogates.get(short, bits=bits, **settings), bits)
    affine = str(settings.pop("affine", "false")).lower()
    if settings:
        raise SettingError(f"{text!r}: " + near_miss("setting", next(iter(settings)), ["bits", "affine"]))
    require(affine in {"true", "false"}, "affine", affine, "true or false")
    require(bits > 1 or affine == "true", "bits", bits, "at least 2 for levels evenly around 0; take affine=true, or the operation sign")
    return Spec("uniform", Round(), bits, affine == "true")


def whole_bits(bits: Any) -> int:
    """`bits`, a number or its text.

    Raises:
        SettingError: it is not a whole number from 1 to 8.
    """
    value = int(bits) if isinstance(bits, str) and bits.strip().lstrip("-").isdecimal() else bits
    require(isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 8, "bits", value, "a whole number from 1 to 8")
    return int(value)


__all__ = ["DSQ", "LSQ", "NONE", "OPERATIONS", "LSQPlus", "Spec", "fitting", "parsed", "whole_bits"]
