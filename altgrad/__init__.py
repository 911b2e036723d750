"""altgrad: train PyTorch models with gradients that do not come from plain backpropagation.

Importing this package imports neither torch nor anything else heavy: public names are looked up when they are first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "Learner": "altgrad.learner",
    "Report": "altgrad.learner",
    "grad": "altgrad.functions",
    "value_and_grad": "altgrad.functions",
    "Key": "altgrad.rng",
    "World": "altgrad.world",
    "Engine": "altgrad.engine",
    "Estimate": "altgrad.engine",
    "Needs": "altgrad.engine",
    "Bias": "altgrad.engine",
    "Split": "altgrad.engine",
    "fit_check": "altgrad.engine",
    "Problem": "altgrad.problem",
    "Batch": "altgrad.problem",
    "Supervised": "altgrad.problems.supervised",
    "Influence": "altgrad.credit",
    "LabelConcat": "altgrad.local.labels",
    "LabelEmbed": "altgrad.local.labels",
    "LabelOverlay": "altgrad.local.labels",
    "quantize": "altgrad.quantisation",
    "dequantize": "altgrad.quantisation",
}
MODULES = ("equilibrium", "hyper", "implicit", "quantisation", "surrogates", "vector")

__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC and name not in MODULES:
        raise AttributeError(f"module 'altgrad' has no attribute {name!r}")
    try:
        if name in MODULES:
            return importlib.import_module(f"altgrad.{name}")
        return getattr(importlib.import_module(PUBLIC[name]), name)
    except ModuleNotFoundError as error:
        from altgrad.errors import missing_extra

        missing = missing_extra(error, f"altgrad.{name}")
        if missing is None:
            raise
        raise missing from error


def __dir__() -> list[str]:
    return sorted([*__all__, *MODULES])
