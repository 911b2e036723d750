"""One model on fixed inputs and fixed draws, seen by forward mode and by autograd; the model's own tensors are never touched."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from altgrad.engine import Tree
from altgrad.errors import AltgradError, UsageError
from altgrad.forward_mode import Dual, Trace, primal_of
from altgrad.forward_mode.activities import ActivityTrace
from altgrad.forward_mode.custom import following_custom_functions
from altgrad.forward_mode.recorder import RUNGS, Recorder
from altgrad.mixing import find_mixing
from altgrad.problem import first_tensor
from altgrad.problems.supervised import Supervised
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers

TOLERANCES = {"float64": 1e-6, "float32": 1e-3}  # relative, of a directional derivative
MEMBERS = 3


@dataclass
class Row:
    """A function that tangents met in a module, and the rung it took: rule, native, decomposition or difference."""

    module: str
    kind: str
    function: str
    rung: str
    calls: int


@dataclass
class Fit:
    """Whether an engine can drive the model, and what is in the way where not."""

    engine: str
    fits: bool
    reason: str


@dataclass
class Report:
    """What `altgrad doctor` found."""

    model: str
    parameters: int
    precision: str
    driven: bool = False  # forward mode got through
    agrees: bool = False  # and its derivative equals backprop's
    error: float | None = None  # relative, of the directional derivative
    tolerance: float = 0.0
    saved_bytes: int | None = None  # kept for a backward pass by forward mode: 0 expected
    saved_bytes_backprop: int | None = None
    rows: list[Row] = field(default_factory=list)
    mixes_examples: list[str] = field(default_factory=list)  # modules in which one example's input reaches other examples' outputs
    batch_statistics: list[str] = field(default_factory=list)  # functions that noted they use them
    weight_tangents: list[str] = field(default_factory=list)  # parameters that no layer rule covers: weight tangents in activity space
    rows_not_examples: list[str] = field(default_factory=list)  # parameters of layers whose axis 0 does not count examples
    unused: list[str] = field(default_factory=list)  # parameters the output does not depend on
    buffers_written: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    engines: list[Fit] = field(default_factory=list)

    @property
    def rung(self) -> str:
        """The lowest rung that was needed."""
        return max((row.rung for row in self.rows), key=RUNGS.index, default="rule")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "rung": self.rung}


class Subject:
    """A model on fixed inputs, random draws and directions."""

    def __init__(self, model: nn.Module, inputs: Any, loss: Any, targets: Any, precision: str, seed: int):
        self.model, self.loss, self.targets, self.key = model, loss, targets, Key(seed)
        self.problem = Supervised(model, lambda outputs, targets: self.score(outputs))
        self.generator_seed = seed
        self.precision = precision
        self.set_up(inputs)
        try:
            self.outputs = self.plain(self.inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if self.precision == "float32":
                raise UsageError(f"{type(model).__name__} fails on these inputs, without altgrad's doing: {first_line(error)}") from error
            self.precision = "float32"
            self.set_up(inputs)
            try:
                self.outputs = self.plain(self.inputs)
            except (RuntimeError, TypeError, ValueError, IndexError) as second:
                raise UsageError(f"{type(model).__name__} fails on these inputs, without altgrad's doing: {first_line(second)}") from second

    def set_up(self, inputs: Any) -> None:
        """Everything in the precision of the examination; the model's own tensors are not touched."""
        dtype = getattr(torch, self.precision)

        def cast(leaf: Any) -> Any:
            return leaf.detach().to(dtype, copy=True) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        self.inputs = tree_map(cast, inputs)
        self.examples = first_tensor(inputs).shape[0] if first_tensor(inputs).ndim else 0
        self.params: Tree = {name: cast(p) for name, p in self.problem.params().items()}
        self.fixed: Tree = {name: cast(p) for name, p in self.model.named_parameters() if name not in self.params}
        self.fixed |= {name: cast(b) for name, b in self.model.named_buffers()}
        drawn = torch.Generator().manual_seed(self.generator_seed)
        self.moves = {name: torch.randn(MEMBERS, *p.shape, generator=drawn).to(p) for name, p in self.params.items()}

    def run(self, params: Tree, inputs: Any) -> tuple[Any, Tree]:
        """The outputs, and the buffers as they were left."""
        kept = {name: value.clone() for name, value in self.fixed.items()}
        inputs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
        return self.problem.forward(params, inputs, kept), kept

    def plain(self, inputs: Any) -> Any:
        with AddressedSamplers(self.key), torch.no_grad():
            return self.run(self.params, inputs)[0]

    def score(self, outputs: Any) -> Any:
        """The mean loss, or Σ over float outputs with fixed random weights."""
        if self.loss is not None:
            return (self.loss(outputs) if self.targets is None else self.loss(outputs, self.targets)).mean()
        drawn = torch.Generator().manual_seed(self.generator_seed + 1)
        floats = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not floats:
            raise UsageError(f"{type(self.model).__name__} returned {type(outputs).__name__} with no float tensor in it; hand in a loss that reads it.")
        return sum((leaf * torch.randn(leaf.shape, generator=drawn).to(primal_of(leaf))).sum() for leaf in floats)

    def backprop(self, report: Report) -> Tensor | None:
        """∇f·v for every direction, by autograd."""
        leaves = {name: value.clone().requires_grad_() for name, value in self.params.items()}
        saved = Saved()
        try:
            with AddressedSamplers(self.key), torch.enable_grad(), saved.counting():
                outputs, buffers = self.run(leaves, self.inputs)
                value = self.score(outputs)
            report.saved_bytes_backprop = saved.count
            report.buffers_written = [name for name, value in buffers.items() if not torch.equal(value, self.fixed[name])]
            if not isinstance(value, Tensor) or not value.requires_grad:
                report.obstacles.append("the output does not depend on any parameter by a path that autograd knows")
                return None
            grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        except RuntimeError as error:
            report.obstacles.append(f"backprop: {first_line(error)}")
            return None
        report.unused = [name for name, grad in zip(leaves, grads, strict=True) if grad is None]
        moved = [self.moves[n].reshape(MEMBERS, -1) @ g.flatten() for n, g in zip(leaves, grads, strict=True) if g is not None]
        return torch.stack(moved).sum(0)

    def forward_mode(self, report: Report, reference: Tensor | None) -> None:
        """The same derivatives from tangents, function by function."""
        trace = Trace(MEMBERS)
        duals: Tree = {name: Dual(value, self.moves[name].clone(), trace) for name, value in self.params.items()}
        recorder = Recorder(trace)
        kinds = {name: type(module).__name__ for name, module in self.model.named_modules()}
        value, saved = None, Saved()
        try:
            with AddressedSamplers(self.key), torch.enable_grad(), following_custom_functions(), saved.counting(), recorder.watching(self.model):
                value = self.score(self.run(duals, self.inputs)[0])
            report.driven = isinstance(value, Dual) or reference is None
            report.saved_bytes = saved.count
        except Exception as error:  # whatever the model's own code makes of a Dual is an obstacle to report, not a crash
            where, function = recorder.failed or ("", "")
            place = f"{where or report.model}{f' ({function})' if function else ''}"
            report.obstacles.append(f"{place}: {first_line(error)}")
        report.rows = [Row(m, kinds.get(m, ""), f, rung, count) for (m, f, rung), count in recorder.counts.items()]
        seen = {(row.rung, row.function) for row in report.rows}
        for name, count in trace.fallbacks.items():  # custom Functions, which no function mode sees
            rung, function = name.split(":", 1)
            if rung in RUNGS and count and (rung, function) not in seen:
                report.rows.append(Row("", report.model, function, rung, count))
        report.batch_statistics = sorted(set(trace.mixes_examples))
        for reason in (name.removeprefix("reason:") for name in trace.fallbacks if name.startswith("reason:")):
            report.obstacles.append(f"no forward formula, so a central difference stands in: {reason}")
        if isinstance(value, Dual) and reference is not None:
            size = float(reference.abs().sum())
            gap = float((value.tangent - reference).abs().sum())
            report.error = gap / size if size else gap
            report.agrees = report.error <= report.tolerance
        elif report.driven and reference is not None:
            report.agrees = not bool(reference.any())
        if report.driven and reference is not None and not report.agrees:
            report.obstacles.append(f"forward mode and autograd disagree by {report.error if report.error is not None else 1.0:.2g}, relative")

    def activities(self, report: Report) -> None:
        """Which parameters have no layer output to be perturbed, and which layers' rows are not examples."""
        if not report.driven:
            return
        trace = SiteTrace(self.key, [0], law="normal", examples=self.examples, first=0, store=True, guide=None, scale=1, grads={})
        with AddressedSamplers(self.key), torch.enable_grad(), following_custom_functions():
            try:
                self.score(self.run(trace.parameters(self.params), self.inputs)[0])
            except (AltgradError, RuntimeError) as error:
                report.obstacles.append(f"perturbed layer outputs: {first_line(error)}")
        report.weight_tangents = sorted(trace.weights)
        report.rows_not_examples = sorted(trace.odd)

    def look_at_examples(self, report: Report) -> None:
        """Change one example and see which others notice."""
        if self.examples < 2:
            report.obstacles.append("one example a batch: whether examples mix cannot be seen; hand in two or more")
            return

        def observed(inputs: Any) -> Any:
            with AddressedSamplers(self.key), torch.no_grad():
                return self.run(self.params, inputs)[0]

        report.mixes_examples = find_mixing(self.model, observed, self.inputs, self.examples, TOLERANCES[self.precision] * 1e-2)


class SiteTrace(ActivityTrace):
    """Notes whose layers' rows do not count examples."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.odd: set[str] = set()

    def site(self, weight: Any, bias: Any, output: Tensor, *args: Any, **kwargs: Any) -> Any:
        if output.ndim == 0 or output.shape[0] != self.examples:
            self.odd |= {p.source.name for p in (weight, bias) if isinstance(p, Dual) and hasattr(p.source, "name")}
        return super().site(weight, bias, output, *args, **kwargs)


class Saved:
    """The bytes that autograd keeps for a backward pass."""

    count = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        def pack(tensor: Tensor) -> Tensor:
            self.count += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
