r"""Claims about engines whose blocks follow losses of their own.

    g_k = ∂L_k/∂W_k alone:   (L_k(W_k + εv) - L_k(W_k - εv)) / 2ε = ⟨g_k, v⟩,   L_k as the engine reports it ("loss.<block>"; the last block's is the loss)

A share of another block's loss in g_k would show in it.
"""

from collections.abc import Sequence

import torch
from torch import nn

from altgrad import metrics
from altgrad.conformance import probes
from altgrad.conformance.claim import KEY, Bench, Subject, claim, hold, same_bits
from altgrad.engine import Bias, Engine, Estimate, Needs, Tree
from altgrad.kernels import noise
from altgrad.rng import tensor_id

STEP = 1e-5
DIFFERENCE = 1e-6  # relative, in float64: ε² of the central difference, and rounding of the losses over ε
WIDTH, SHALLOW, DEEP = 8, 4, 16
GROWTH = 1.01  # of saved bytes from SHALLOW to DEEP blocks


def local(engine: Engine) -> bool:
    return engine.bias is Bias.LOCAL


def sees_later_blocks(engine: Engine) -> bool:
    return getattr(getattr(engine, "rule", None), "sees", "none") == "all"


def names_of(bench: Bench) -> list[list[str]]:
    """The trainables of every block: the model's, and the engine's own, which end in the block's name."""
    blocks = bench.problem.blocks(getattr(bench.engine, "cut", ""))
    return [[*block.parameters, *(name for name in bench.aux if name.endswith(f".{block.name}"))] for block in blocks]


def loss_of(found: Estimate, blocks: Sequence[str], position: int) -> torch.Tensor:
    """The loss that a block reports."""
    return found.metrics.get(f"loss.{blocks[position]}", found.loss) if position < len(blocks) - 1 else found.loss


def moved(params: Tree, names: Sequence[str], distance: float) -> Tree:
    """`params` with those of `names` moved along a fixed direction."""

    def direction(name: str) -> torch.Tensor:
        return noise.draw("normal", KEY.fold("direction"), tensor_id(name), [0], params[name].shape)[0].to(params[name])

    return {name: value.detach() + distance * direction(name) if name in names else value.detach() for name, value in params.items()}


@claim(applies=lambda engine: local(engine) and not sees_later_blocks(engine))
def every_block_follows_its_own_loss_alone(subject: Subject) -> None:
    bench = subject.bench(probes.network(torch.float64)).warm()
    blocks = [block.name for block in bench.problem.blocks(getattr(bench.engine, "cut", ""))]
    base, grads, looked = dict(bench.params), dict(bench.estimate().grads), 0
    for position, names in enumerate(names_of(bench)):
        given = [name for name in names if name in grads]
        if not given:
            continue  # another block's turn
        looked += 1
        losses = []
        for distance in (STEP, -STEP):
            bench.params = moved(base, given, distance)
            losses.append(float(loss_of(bench.estimate(), blocks, position)))
        bench.params = base
        seen = (losses[0] - losses[1]) / (2 * STEP)
        unit = moved({name: torch.zeros_like(base[name]) for name in given}, given, 1.0)
        stated = float(sum((grads[name] * unit[name]).sum() for name in given))
        size = float(torch.stack([grads[name].norm() * unit[name].norm() for name in given]).sum())
        hold(
            abs(seen - stated) <= DIFFERENCE * max(size, 1e-12),
            f"block {blocks[position]}: its own loss changes by {seen:.9g} along a direction, its gradient says {stated:.9g}; no other loss may reach it.",
        )
    hold(looked > 0, "no block got a gradient.")


@claim(applies=lambda engine: local(engine) and not sees_later_blocks(engine))
def what_later_blocks_are_does_not_move_a_blocks_gradient(subject: Subject) -> None:
    bench = subject.bench(probes.network()).warm()
    base, before, names = dict(bench.params), dict(bench.estimate().grads), names_of(bench)
    for position in range(len(names) - 1):
        later = [name for group in names[position + 1 :] for name in group]
        bench.params = moved(base, later, 1.0)
        after = dict(bench.estimate().grads)
        for name in names[position]:
            if name in before:
                hold(name in after and same_bits(before[name], after[name]), f"the gradient of {name} moved with later blocks' weights; detach between blocks.")
    bench.params = base


@claim(applies=lambda engine: Needs.BLOCKS in engine.needs)
def saved_bytes_do_not_grow_with_depth(subject: Subject) -> None:
    peaks = []
    for depth in (SHALLOW, DEEP):

        def build(depth: int = depth) -> nn.Module:
            hidden = [layer for _ in range(depth) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
            return nn.Sequential(*hidden, nn.Linear(WIDTH, probes.CLASSES))

        bench = subject.bench(probes.Probe(build, probes.data("deep", WIDTH)))
        bench.estimate()
        with metrics.saved_bytes() as meter:
            bench.estimate()
        peaks.append(meter.peak)
    hold(
        peaks[1] <= GROWTH * peaks[0],
        f"at most {peaks[0]} bytes are saved for backward sweeps at {SHALLOW} blocks, {peaks[1]} at {DEEP}; free a block's graph before the next one's.",
    )
