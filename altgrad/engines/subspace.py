r"""Any engine, searching in a fixed random subspace: θ = θ₀ + P z with z of D numbers, of which the engine estimates the gradient.

    P = S Π,  column k of P has entries ±1/√n_k at the n_k parameters that a permutation deals to coordinate k, and zeros elsewhere

Every parameter has one coordinate and one sign, every coordinate d/D parameters (one more or less), so that the columns are orthonormal: PᵀP = I,
‖θ - θ₀‖ = ‖z‖, and with D = d the subspace is the whole space. The gradient with respect to z is Pᵀ∇f, the projection of ∇f.

θ₀ is what the model holds; no gradient is given for it and nothing moves it. `predict` reads out θ₀ + P z, the model alone computes θ₀: `bake`
makes the model the trained one. P is a function of the run's key, 4 bytes a parameter while training and 16 bytes in a checkpoint. What evaluates
members by perturbing z writes each member's θ out in full, d numbers: the inner engine's `chunk` bounds that, and low-rank noise has no meaning
for a vector z.

Source: Li, Farkhoor, Liu, Yosinski 2018, "Measuring the Intrinsic Dimension of Objective Landscapes", arXiv 1804.08838, section 2.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from altgrad import registry, rng
from altgrad.engine import Bias, Engine, Estimate, Needs, Split, Tree, flag_names
from altgrad.errors import CapabilityError, SettingError, require
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.world import World

Z = "subspace.z"
SEED = "subspace.seed"  # of P, in the engine's state: its low and its high 32 bits, which means over ranks leave exact
INNER = "subspace.inner."  # before the names of the inner engine's state
VIEWS = Needs.VALUE | Needs.TANGENT | Needs.REVERSE | Needs.UNROLL  # what a problem still provides when it is a function of z


class Projection:
    """P for parameters of given shapes.

    Args:
        seed: which of all.
        params: by name; all of them together have d elements.
        dimension: D, 1 … d.
    """

    def __init__(self, seed: int, params: Tree, dimension: int):
        self.seed, self.dimension = seed, dimension
        sizes = [value.numel() for value in params.values()]
        total, key = sum(sizes), Key(seed)
        place = np.empty(total, dtype=np.int32)
        place[rng.permutation(key, "coordinates", total)] = np.arange(total) % dimension
        place += dimension * (rng.sign(key, rng.tensor_id("signs"), [0], total)[0] < 0)
        # One number an element: k for an entry +1/√n_k of column k, D + k for -1/√n_k.
        self.places = {name: part.to(params[name].device) for name, part in zip(params, torch.from_numpy(place).split(sizes), strict=True)}
        self.lengths = torch.from_numpy(np.bincount(place % dimension, minlength=dimension)).double().sqrt()  # √n_k, [D]

    def lies_beside(self, params: Tree) -> bool:
        """Whether it is on the devices of the parameters."""
        return all(place.device == params[name].device for name, place in self.places.items())

    def move(self, z: Tensor, name: str, like: Tensor) -> Tensor:
        """The part of P z that belongs to one parameter, in its shape and z's dtype."""
        scaled = z / self.lengths.to(z)
        return torch.cat([scaled, -scaled]).to(like.device).index_select(0, self.places[name]).reshape(like.shape)

    def apply(self, origin: Tree, z: Tensor) -> Tree:
        """θ₀ + P z, added in z's dtype."""
        return {name: (value.to(z.dtype) + self.move(z, name, value)).to(value.dtype) for name, value in origin.items()}


class InSubspace(Problem):
    """`base` as a function of z."""

    def __init__(self, base: Problem, origin: Tree, projection: Projection, z: Tensor):
        self.base, self.origin, self.projection, self.z = base, origin, projection, z
        self.name, self.differentiable, self.horizon, self.steps_per_epoch = base.name, base.differentiable, base.horizon, base.steps_per_epoch

    def at(self, params: Tree) -> Tree:
        """The problem's own parameters."""
        return self.projection.apply(self.origin, params[Z])

    @property
    def facts(self) -> dict[Any, Any]:
        found: dict[Any, Any] = self.base.recall("facts in the subspace", dict)
        return found

    @property
    def provides(self) -> Needs:
        return self.base.provides & VIEWS

    @property
    def classes(self) -> int | None:
        return self.base.classes

    def params(self) -> Tree:
        return {Z: self.z}

    def buffers(self) -> Tree:
        return self.base.buffers()

    def batch(self, step: int, world: World) -> Batch:
        return self.base.batch(step, world)

    def batch_size_of(self, batch: Batch) -> int:
        return self.base.batch_size_of(batch)

    def forward(self, params: Tree, inputs: Any, buffers: Tree) -> Any:
        return self.base.forward(self.at(params), inputs, buffers)

    def losses(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        return self.base.losses(self.at(params), batch, buffers)

    def loss(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        return self.base.loss(self.at(params), batch, buffers)

    def objective(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        return self.base.objective(self.at(params), batch, buffers)

    def judge(self, outputs: Any, batch: Batch) -> Tensor:
        return self.base.judge(outputs, batch)

    def score(self, outputs: Any, targets: Any) -> Tensor:
        return self.base.score(outputs, targets)

    def start(self, batch: Batch) -> Tree:
        return self.base.start(batch)

    def unroll(self, params: Tree, carry: Tree, batch: Batch, buffers: Tree) -> tuple[Tensor, Tree]:
        return self.base.unroll(self.at(params), carry, batch, buffers)


@dataclass(frozen=True)
class RandomSubspace(Engine):
    """`inner` on z, where θ = θ₀ + P z with a fixed random P of orthonormal columns; what an estimate is, `inner` decides.

    Noise of scale σ in z moves θ by σ√dimension in all, whatever its size: sigma is to be larger than in the whole space.

    Raises:
        SettingError: a dimension below 1 or above the number of parameters; an unknown inner setting.
        CapabilityError: an inner engine that looks at more than losses, or trains tensors of its own.

    Source: Li et al. 2018, arXiv 1804.08838.
    """

    dimension: int = field(default=200, metadata={"help": "D, the length of z: from 1 to the number of parameters"})
    inner: str = field(default="es", metadata={"help": "the engine that searches: any that needs only losses or their derivatives"})
    inner_settings: str = field(default="", metadata={"help": "of the inner engine, as sigma=0.1,population=64 (or with ; between them)"})

    def __post_init__(self) -> None:
        require(isinstance(self.dimension, int) and self.dimension >= 1, "dimension", self.dimension, "a whole number >= 1")
        given: Any = self.inner_settings
        if isinstance(given, Mapping):  # kept as text: settings are plain values
            object.__setattr__(self, "inner_settings", ",".join(f"{name}={value}" for name, value in given.items()))
        require(isinstance(self.inner_settings, str), "inner_settings", self.inner_settings, "text as sigma=0.1,population=64, or a dict")
        require(isinstance(self.inner, str), "inner", self.inner, "the name of an engine")
        if self.inner == "random-subspace":
            raise SettingError("inner='random-subspace' is not allowed: a subspace of a subspace is one of fewer dimensions; set dimension.")
        beyond = self.rule.needs & ~VIEWS
        if beyond:
            raise CapabilityError(
                f"inner={self.inner!r} needs {flag_names(beyond)}, which a function of z does not provide; "
                f"use an engine that needs no more than {flag_names(VIEWS)}, for instance es."
            )

    @cached_property
    def rule(self) -> Engine:
        """The inner engine."""
        pairs = [part for part in re.split(r"[,;\s]+", self.inner_settings) if part]
        found: Engine = registry.engine(self.inner, registry.split_pairs(pairs))
        return found

    @property
    def name(self) -> str:
        return "random-subspace"

    @property
    def needs(self) -> Needs:
        return self.rule.needs

    @property
    def bias(self) -> Bias:
        return self.rule.bias

    @property
    def split(self) -> Split:
        return self.rule.split

    @property
    def source(self) -> str:
        return f"Li et al. 2018, arXiv 1804.08838, section 2; {self.inner}: {self.rule.source}"

    def aux(self, problem: Problem, key: Key) -> Tree:
        params = problem.params()
        total = sum(value.numel() for value in params.values())
        require(self.dimension <= total, "dimension", self.dimension, f"at most {total}, the number of parameters")
        first = next(iter(params.values()))
        z = torch.zeros(self.dimension, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
        more = self.rule.aux(InSubspace(problem, params, Projection(0, params, 1), z), key)
        if more:
            raise CapabilityError(f"inner={self.inner!r} trains tensors of its own with these settings ({', '.join(more)}), which have no place in a subspace.")
        return {Z: z}

    def init(self, problem: Problem, params: Tree, key: Key) -> Tree:
        seed = key.fold("subspace").seed
        words = torch.tensor([seed % 2**32, seed >> 32], dtype=torch.int64, device=params[Z].device)
        inside = self.inside(problem, params, {SEED: words})
        return {SEED: words, **{INNER + name: value for name, value in self.rule.init(inside, inside.params(), key).items()}}

    def projection(self, problem: Problem, state: Tree, origin: Tree) -> Projection:
        """P, made once; the state's seed is read from the device again only where the state is another one."""
        words = state[SEED]
        read, found = problem.facts.get("subspace", (None, None))  # the tensor that the seed was read from, and P
        if read is not words or found.dimension != self.dimension:
            low, high = words.tolist()
            seed = (high << 32) + low
            if found is None or (found.seed, found.dimension) != (seed, self.dimension) or not found.lies_beside(origin):
                found = Projection(seed, origin, self.dimension)
            problem.facts["subspace"] = words, found
        made: Projection = found
        return made

    def inside(self, problem: Problem, params: Tree, state: Tree) -> InSubspace:
        """The problem as a function of z, about the parameters as they are."""
        own = problem.params()
        origin = {name: params[name].detach() for name in own}
        return InSubspace(problem, origin, self.projection(problem, state, origin), params[Z].detach())

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        inside = self.inside(problem, params, state)
        inner = {name.removeprefix(INNER): value for name, value in state.items() if name.startswith(INNER)}
        found = self.rule.estimate(inside, inside.params(), inner, batch, key, world)
        return found._replace(state={SEED: state[SEED], **{INNER + name: value for name, value in found.state.items()}})

    def predict(self, problem: Problem, params: Tree, state: Tree, inputs: Any) -> Any:
        inside = self.inside(problem, params, state)
        inner = {name.removeprefix(INNER): value for name, value in state.items() if name.startswith(INNER)}
        return self.rule.predict(inside, inside.params(), inner, inputs)

    def bake(self, problem: Problem, params: Tree, state: Tree) -> Tree:
        """θ₀ + P z in place of θ₀, and z = 0: the same read-out, which the model alone now computes."""
        inside = self.inside(problem, params, state)
        return {**params, **inside.at(inside.params()), Z: torch.zeros_like(inside.z)}
