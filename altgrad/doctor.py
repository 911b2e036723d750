"""What stands between a model and the engines: the operation ladder's report, and the checks behind it.

(d/dε) f(θ + εv) by forward mode  =  ∇f(θ)·v by autograd,   f = the loss, or Σ over outputs with fixed random weights.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from altgrad import registry
from altgrad.engine import Engine, Needs, fit_check, flag_names
from altgrad.engines.backprop import Backprop
from altgrad.engines.mixed import Mixed
from altgrad.engines.spelling import parts_of
from altgrad.errors import AltgradError, UsageError, require
from altgrad.examination import TOLERANCES, Fit, Report, Row, Subject, first_line
from altgrad.probes import PROBES, Probe
from altgrad.problem import Batch
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key
from altgrad.world import World


def examine(
    model: nn.Module,
    inputs: Any,
    *,
    loss: Callable[..., Tensor] | None = None,
    targets: Any = None,
    precision: str = "float64",
    seed: int = 0,
    at: Sequence[str] = (),
) -> Report:
    """Drive `model` by forward mode in its present mode (training or evaluation) and compare with autograd; the model is left as it was.

    Args:
        inputs: a tensor, a tuple or a dict, as Learner takes them.
        loss: (outputs, targets) -> losses, or (outputs) -> losses where there are no targets; None for a random weighting of the outputs.
        precision: "float64" or "float32"; a model that refuses float64 is examined in float32.
        at: parts of a mix, as head=backprop: every engine is then tried as the rest of it too.

    Raises:
        UsageError: the model itself fails on these inputs, or a part does not fit the model.
    """
    require(precision in TOLERANCES, "precision", precision, "'float64' or 'float32'")
    subject = Subject(model, inputs, loss, targets, precision, seed)
    report = Report(type(model).__name__, sum(p.numel() for p in model.parameters()), subject.precision, tolerance=TOLERANCES[subject.precision])
    reference = subject.backprop(report)
    subject.forward_mode(report, reference)
    subject.activities(report)
    subject.look_at_examples(report)
    report.engines = fits(subject.problem, report)
    report.engines += tried_in_mixes(subject.problem, Batch(inputs, targets), at) if at else []
    return report


def fits(problem: Supervised, report: Report) -> list[Fit]:
    """Every engine with its default settings: does it fit, and if not, why."""
    found = []
    for name in registry.names("engine"):
        try:
            rule = registry.find("engine", name)()
            needs = rule.needs
        except (AltgradError, ImportError, TypeError) as error:
            found.append(Fit(name, False, f"cannot be loaded: {first_line(error)}"))
            continue
        missing = needs & ~problem.provides
        refused = "" if missing else refusal(rule, problem)
        broken = next((text for text in report.obstacles if text.startswith("backprop:")), "")
        if missing:
            reason = f"needs {flag_names(missing)}, which a model and a loss do not provide"
        elif Needs.TANGENT in needs and not report.driven:
            reason = f"forward mode does not get through: {report.obstacles[-1] if report.obstacles else 'no tangent arrives'}"
        elif Needs.REVERSE in needs and broken:
            reason = broken
        else:
            reason = refused
        found.append(Fit(name, not reason, reason))
    return found


def refusal(rule: Engine, problem: Supervised) -> str:
    """Why a rule does not take a model that has all it needs; "" where it does."""
    try:
        rule.check(problem)
    except AltgradError as error:
        return first_line(error)
    return ""


def tried_in_mixes(problem: Supervised, batch: Batch, at: Sequence[str]) -> list[Fit]:
    """Every engine beside the parts `at`: one estimate in the model's own precision, which tells what a list of needs cannot."""
    parts = parts_of(list(at))
    Mixed(Backprop(), parts).split_up(problem)  # patterns that do not fit are the caller's mistake, whatever the rest
    found = []
    for name in registry.names("engine"):
        if name == "mixed":
            continue
        reason = ""
        try:
            mix = Mixed(registry.engine(name), parts)
            fit_check(mix, problem)
            params = {**problem.params(), **mix.aux(problem, Key(0))}
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="in the part")  # derivatives that are all zero train nothing
                mix.estimate(problem, params, mix.init(problem, params, Key(0)), batch, Key(0), World())
        except Exception as error:  # whatever the model's own code makes of the estimate is what is in the way
            reason = first_line(error)
        found.append(Fit(", ".join([name, *at]), not reason, reason))
    return found


def examine_probes(probes: Iterable[Probe] = PROBES, *, precision: str = "float64") -> list[dict[str, Any]]:
    """One row a module kind: name, driven, agrees, error, rung, functions below a native formula, saved bytes, mixing."""
    rows = []
    for probe in probes:
        module, inputs = probe.build(torch.Generator().manual_seed(0))
        report = examine(module, inputs, precision=precision)
        below = sorted({f"{row.rung}: {row.function}" for row in report.rows if row.rung in {"decomposition", "difference"}})
        rows.append(
            {
                "name": probe.name,
                "driven": report.driven,
                "agrees": report.agrees,
                "error": report.error,
                "rung": report.rung,
                "functions": below,
                "saved_bytes": report.saved_bytes,
                "mixes_examples": report.mixes_examples,
                "weight_tangents": report.weight_tangents,
            }
        )
    return rows


def example_inputs(model: nn.Module, target: str = "", *, shape: str | None = None, batch: int = 4, seed: int = 0) -> Any:
    """Inputs to examine `model` on: normal ones of `shape` ("1,28,28", without the batch axis), or its own `example_inputs`.

    `example_inputs` is an attribute or method of the model, or a name in the module of `target`.

    Raises:
        UsageError: neither is there, or the shape cannot be read.
    """
    if shape is not None:
        try:
            sizes = [int(part) for part in shape.replace("x", ",").split(",") if part.strip()]
        except ValueError:
            sizes = []
        if not sizes or min(sizes) < 1:
            raise UsageError(f"--input-shape {shape!r} is not allowed; it must be whole numbers >= 1 for one example, for instance 1,28,28.")
        return torch.randn(batch, *sizes, generator=torch.Generator().manual_seed(seed))
    owner = sys.modules.get(target.partition(":")[0])
    found = getattr(model, "example_inputs", None)
    found = getattr(owner, "example_inputs", None) if found is None else found
    if found is None:
        raise UsageError(
            f"no inputs to examine {type(model).__name__} on: give --input-shape (for instance 1,28,28), or add `example_inputs`, "
            "a tensor, tuple or dict (or a function that returns one), to the model or its Python module."
        )
    return found() if callable(found) and not isinstance(found, Tensor) else found


__all__ = ["Fit", "Report", "Row", "examine", "examine_probes", "example_inputs"]
