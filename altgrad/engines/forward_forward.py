r"""Forward-forward: blocks learn to be active on inputs that carry their right label, and quiet on those that carry a wrong one.

    g_k = Σ_j a_kj²,   L_k = softplus(-(g_k⁺ - θ)) + softplus(g_k⁻ - θ),   a_k = f_k(a_{k-1} / √mean a_{k-1}²)

Every block but the last follows its own goodness. The last is the model's head: it follows the problem's own loss on the activities of inputs without
a label, as does a linear probe beside every block. Neither moves the blocks before it.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from altgrad.engine import Estimate, Needs, Tree, describe
from altgrad.engines.blockwise import Blockwise, option
from altgrad.errors import SettingError, ShapeError, near_miss, require
from altgrad.local.goodness import LOSSES, Goodness
from altgrad.local.labelled_step import PROBE, LabelledStep, marked, probed
from altgrad.local.losses.frame import FEATURES, drawn, width
from altgrad.local.prefix import evaluating
from altgrad.local.step import TRAINED, Step
from altgrad.problem import Batch, Problem, first_tensor
from altgrad.rng import Key
from altgrad.world import World

COLLAPSE, WARM_UP = 0.05, 100  # goodness over threshold on right labels, and the steps after which it is looked at (and between looks: a device waits)
READ_ROWS = 65536  # rows that are read out in one call, at most; at least one label's
HEAD_READOUTS = ("probe", "own")
READOUTS: Mapping[str, Callable[["ForwardForward", list[Tensor]], Tensor]] = {
    "goodness": lambda engine, found: torch.stack(found[min(engine.skip, len(found) - 1) :]).sum(0),
    "network": lambda engine, found: torch.stack(found).sum(0),
    "last": lambda engine, found: found[-1],
}


@dataclass(frozen=True)
class ForwardForward(Blockwise):
    """Goodness for right labels, none for wrong ones; no error is sent back.

    Raises:
        SettingError: a setting out of range. CapabilityError: as Blockwise, or an input without room for the labels. DataError: as Blockwise.

    Source: Hinton 2022, arXiv 2212.13345; symba: Lee, Song 2023, arXiv 2303.08418; collaboration: Lorberbom et al. 2024, arXiv 2305.12393.
    """

    readout: str = option("network", "what predicts: " + ", ".join((*READOUTS, *HEAD_READOUTS)) + ", or a block's name")
    variant: str = option(
        "logistic", "'logistic' (against a threshold), 'symba' (right against wrong), 'collaboration' (logistic, with other blocks' goodness)"
    )
    goodness: str = option("sum", "'sum' or 'mean' of a block's squared activities")
    threshold: float = option(1.0, "the goodness that separates right from wrong, per unit")
    alpha: float | None = option(None, "symba: steepness; none for 4 over the number of units where goodness is a sum, 4 where it is a mean")
    others: str = option("all", "collaboration: whose goodness counts beside a block's own, 'all' others' or that of the blocks 'before'")
    gamma: float = option(1.0, "collaboration: weight of the others' goodness")
    negatives: str = option("uniform", "wrong labels: 'uniform' (each as likely) or 'hard' (as likely as the probes find them, from one pass more)")
    peer: float = option(0.0, "weight of peer normalisation, which keeps units from falling silent (the forward-forward paper has 0.03)")
    label_scale: float = option(0.75, "size of the label's mark over the length of the input beside it")
    skip: int = option(1, "how many of the first blocks have no say in the read-out 'goodness'; all have one in 'network'")

    looks: ClassVar[type[Step]] = LabelledStep

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in LOSSES:
            raise SettingError(near_miss("variant", str(self.variant), LOSSES))
        require(self.negatives in {"uniform", "hard"}, "negatives", self.negatives, "'uniform' or 'hard'")
        require(isinstance(self.skip, int) and self.skip >= 0, "skip", self.skip, "a whole number >= 0")
        require(0 < self.label_scale < float("inf"), "label_scale", self.label_scale, "a number > 0")
        self.rule  # noqa: B018 - checks its settings

    @cached_property
    def rule(self) -> Goodness:  # type: ignore[override]
        own: dict[str, dict[str, Any]] = {"symba": {"alpha": self.alpha}, "collaboration": {"others": self.others, "gamma": self.gamma}}
        return LOSSES[self.variant](goodness=self.goodness, threshold=self.threshold, peer=self.peer, **own.get(self.variant, {}))

    @property
    def name(self) -> str:
        return "forward-forward"

    @property
    def needs(self) -> Needs:
        return Needs.REVERSE | Needs.BLOCKS | Needs.LABELS

    @property
    def source(self) -> str:
        return "Hinton 2022, arXiv 2212.13345; Lee, Song 2023, arXiv 2303.08418; Lorberbom, Gat, Adi, Schwing, Hazan 2024, arXiv 2305.12393"

    @property
    def readouts(self) -> tuple[str, ...]:
        return tuple(name for name in (*READOUTS, *HEAD_READOUTS) if name != self.readout)

    def instead(self) -> str:
        return "it judges an input together with its label; use the engine local with loss=greedy, which takes any loss, or backprop."

    # -- before the first step ---------------------------------------------------------------------------------------------------

    def check(self, problem: Problem) -> None:
        super().check(problem)
        site, inputs = self.sites(problem)[0], problem.example()
        with torch.no_grad(), evaluating(problem):
            labelled = marked(problem, inputs, self.label_scale, int(site.classes or 0), range(1))
            found = problem.blocks(self.cut)[0].apply(problem.params(), labelled, problem.fresh_buffers())
        if tuple(found.shape[1:]) != site.shape:
            raise ShapeError(f"{describe(self)}: block {site.name!r} gives {site.shape} an example, but {tuple(found.shape[1:])} where it has a label.")

    def check_readout(self, blocks: Sequence[str]) -> None:
        if self.readout not in (*READOUTS, *HEAD_READOUTS, *blocks):
            raise SettingError(near_miss("readout", self.readout, [*READOUTS, *HEAD_READOUTS, *blocks]))

    def aux(self, problem: Problem, key: Key) -> Tree:
        found = super().aux(problem, key)
        for site in self.sites(problem):
            shape = (int(site.classes or 0), width(site.shape, FEATURES))
            found[f"{PROBE}{site.name}.weight"] = drawn(key.fold("probe"), site.name, shape, site)
            found[f"{PROBE}{site.name}.bias"] = torch.zeros(shape[0], dtype=site.dtype, device=site.device)
        return found

    # -- a step ------------------------------------------------------------------------------------------------------------------

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        found = super().estimate(problem, params, state, batch, key, world)
        ratios = {name.removeprefix("goodness."): value for name, value in found.metrics.items() if name.startswith("goodness.")}
        if not ratios:
            return found
        low = torch.stack(list(ratios.values())) < COLLAPSE
        if key.step and key.step % WARM_UP == 0 and "collapse" not in problem.facts and bool(low.any()):
            problem.facts["collapse"] = True
            silent = [name for name, flag in zip(ratios, low.tolist(), strict=True) if flag]
            warnings.warn(
                f"goodness has collapsed in block {', '.join(silent)}: at step {key.step} it is below {COLLAPSE} of its threshold on right labels too, so "
                "nothing is told apart. Use goodness='sum' with threshold=1, variant='symba', peer=0.03, or another learning rate.",
                stacklevel=2,
            )
        return found._replace(metrics={**found.metrics, "collapsed": low.sum()})

    # -- read-outs ---------------------------------------------------------------------------------------------------------------

    def scores(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> tuple[dict[str, Tensor], Tensor]:
        """(goodness of every class by block [N, classes], the model's own output); blocks that have never been trained are left out."""
        return self.goodnesses(problem, params, state, inputs), self.outputs(problem, params, state, inputs)[1]

    def goodnesses(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> dict[str, Tensor]:
        """block -> goodness [N, classes] of the inputs with each label in turn, all labels in one call."""
        sites, count = self.trained(problem, state), len(first_tensor(inputs))
        classes = int(self.sites(problem)[0].classes or 0)
        at_once = max(1, READ_ROWS // max(1, count))
        found: dict[str, list[Tensor]] = {}
        for start in range(0, classes, at_once):
            labels = range(start, min(start + at_once, classes))
            carried, buffers = marked(problem, inputs, self.label_scale, classes, labels), problem.fresh_buffers()
            for site, block in zip(self.sites(problem), problem.blocks(self.cut), strict=False):
                carried = block.apply(params, carried, buffers)
                if site.name in sites:
                    found.setdefault(site.name, []).append(self.rule.of(carried).view(len(labels), count))
                carried = self.rule.bridge(carried)
        return {name: torch.cat(parts).T for name, parts in found.items()}

    def outputs(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> tuple[list[Tensor], Tensor]:
        """(what every trained block's probe says, the model's own output) of inputs without a label, from one pass."""
        names, sites, buffers = self.trained(problem, state), self.sites(problem), problem.fresh_buffers()
        blocks = problem.blocks(self.cut)
        carried, probes = marked(problem, inputs, self.label_scale, int(sites[0].classes or 0), range(0)), []
        for site, block in zip(sites, blocks, strict=False):
            carried = block.apply(params, carried, buffers)
            if site.name in names:
                probes.append(probed(carried, params, site.name))
            carried = self.rule.bridge(carried)
        return probes, blocks[-1].apply(params, carried, buffers)

    def trained(self, problem: Problem, state: Tree) -> set[str]:
        """The blocks that have been trained at all."""
        sites = self.sites(problem)
        flags = state[TRAINED].tolist() if TRAINED in state else [1.0] * len(sites)
        return {site.name for site, flag in zip(sites, flags, strict=True) if flag}

    def reads(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> dict[str, Any]:
        found, (probes, own) = self.goodnesses(problem, params, state, inputs), self.outputs(problem, params, state, inputs)
        named = {name: read(self, list(found.values())) for name, read in READOUTS.items()} if found else {}
        return {**found, **named, **({"probe": torch.stack(probes).mean(0)} if probes else {}), "own": own}

    def entry(self, problem: Problem, inputs: Any) -> Any:
        return marked(problem, inputs, self.label_scale, int(self.sites(problem)[0].classes or 0), range(0))

    def predict(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> Any:
        if self.readout in HEAD_READOUTS:
            probes, own = self.outputs(problem, params, state, inputs)
            return torch.stack(probes).mean(0) if self.readout == "probe" and probes else own
        found = self.goodnesses(problem, params, state, inputs)
        if not found:
            return self.outputs(problem, params, state, inputs)[1]
        return found[self.readout] if self.readout in found else READOUTS.get(self.readout, READOUTS["network"])(self, list(found.values()))
