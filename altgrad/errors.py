"""Every error a user can meet: what was wrong, the value seen, what is allowed, what to do; and the exit code it maps to."""

import difflib
from collections.abc import Iterable


class AltgradError(Exception):
    """Base of all altgrad errors; `exit_code` is what the command line leaves with."""

    exit_code = 1


class UsageError(AltgradError):
    """A wrong name, setting or argument."""

    exit_code = 2


class SettingError(UsageError):
    """A setting that does not exist, cannot be parsed, or lies out of its range."""


class CapabilityError(UsageError):
    """An engine was put on a problem that lacks what the engine needs."""


class ShapeError(AltgradError):
    """A model, loss or batch gave a tensor of a shape that cannot be used."""


class DataError(AltgradError):
    """A data set is missing, damaged, or its labels are out of range."""


class NumericsError(AltgradError):
    """A loss or an estimate is NaN or infinite."""

    exit_code = 3


class SingularError(NumericsError):
    """A linear system has no unique solution: its matrix is singular, exactly or to rounding."""


class InfeasibleError(NumericsError):
    """A constrained problem has no feasible point, or its objective no minimum."""


class NotConvergedError(NumericsError):
    """A solver stopped before its tolerance was met, under strict=True."""


class NotConvergedWarning(UserWarning):
    """A solver stopped before its tolerance was met: what follows from its answer is off by about its residual times the condition number."""


class CheckpointError(AltgradError):
    """A checkpoint is missing, damaged, foreign, or of a newer format."""

    exit_code = 4


class MissingExtraError(AltgradError):
    """An optional dependency is not installed."""

    exit_code = 5

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package}, which is not installed. Run: pip install 'altgrad[{extra}]'")


# The package as it is imported -> the extra that brings it, and its name on the index where that is another.
EXTRAS = {
    "torch": "torch",
    "safetensors": "torch",
    "sklearn": "data",
    "PIL": "data",
    "matplotlib": "plot",
    "pytorch_optimizer": "optim",
    "gymnasium": "gymnasium",
}
INDEX_NAMES = {"sklearn": "scikit-learn", "PIL": "pillow", "pytorch_optimizer": "pytorch-optimizer"}


def missing_extra(error: ModuleNotFoundError, purpose: str) -> MissingExtraError | None:
    """The error to raise in place of `error` where the module that was not found comes with one of our extras."""
    package = (error.name or "").split(".")[0]
    return MissingExtraError(INDEX_NAMES.get(package, package), EXTRAS[package], purpose) if package in EXTRAS else None


class Interrupted(AltgradError):
    """SIGINT (130) or SIGTERM (143) arrived; the checkpoint has been written."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def near_miss(kind: str, name: str, allowed: Iterable[str]) -> str:
    """The sentence for an unknown name: the value seen, the nearest allowed one, and all that are allowed."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Allowed: {', '.join(names) or 'none'}."


def require(condition: bool, setting: str, value: object, allowed: str) -> None:
    """Raise SettingError unless `condition`: `setting`=`value` must be `allowed`."""
    if not condition:
        raise SettingError(f"{setting}={value!r} is not allowed; it must be {allowed}.")
