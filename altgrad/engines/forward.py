r"""Forward gradients: directional derivatives measured exactly by forward mode, no backward pass.

weights      ĝ = (1/K) Σ_k (∇f·v_k) v_k,  E[v vᵀ] = I; relative variance (d + 1)/K for normal v, (d - 1)/K for signs.
activations  δ_ln = (1/K) Σ_k j_kn ε_kln, ∂W = δ xᵀ (see forward_mode/activities.py).
orthogonal   ĝ = V (VᵀV)⁻¹ Vᵀ∇f, the projection on the span of the K tangents; shrunk by K/d, or rescaled by d/K.
guesses      directions u that are guessed rather than drawn are measured exactly and added; the K random ones keep to their
             complement:  ĝ = (∇f·u) u + (1/K) Σ_k (∇f·v_k^⊥) v_k^⊥, still unbiased. With tangents=0 only the guesses remain.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from altgrad.credit import per_example
from altgrad.engine import Bias, Engine, Estimate, Needs, Split, Tree
from altgrad.errors import CapabilityError, SettingError, require
from altgrad.forward_mode import Dual, Trace, following_custom_functions, primal_of
from altgrad.forward_mode.activities import ActivityTrace, independent_rows
from altgrad.forward_mode.guide import PREFIX, Guide
from altgrad.forward_mode.together import draw_together
from altgrad.kernels import scratch
from altgrad.perturb import Dense, Directions, Steered, directions
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.samplers import AddressedSamplers
from altgrad.world import World


@dataclass(frozen=True)
class Forward(Engine):
    """Forward gradient with K tangents, in weight or activation space.

    Raises:
        SettingError: a setting out of range, or two that exclude each other.

    Source: Baydin et al. 2022, arXiv 2202.08587 (weights); Ren et al. 2023, arXiv 2210.03310 (activations); Flügel et al. 2025, arXiv
    2410.17764 (orthogonal); Fournier et al. 2023, arXiv 2306.06968 (guesses).
    """

    space: str = field(default="activations", metadata={"help": "perturb 'weights' or 'activations' (far lower variance on networks)"})
    tangents: int = field(default=16, metadata={"help": "K, random directions a step, >= 1 (0 allowed beside a guess)"})
    noise: str = field(default="normal", metadata={"help": "law of the directions: 'normal' or 'sign'"})
    rank: int | None = field(default=None, metadata={"help": "weights: None for dense directions, r >= 1 for V = A Bᵀ/√r"})
    chunk: int | None = field(default=None, metadata={"help": "directions in memory at once; bounds memory, does not change the result"})
    combine: str = field(default="mean", metadata={"help": "weights: 'mean', or 'orthogonal' (projection on the span)"})
    rescale: bool = field(default=False, metadata={"help": "orthogonal: multiply by d/K, which makes it unbiased"})
    memory: str = field(default="store", metadata={"help": "activations: 'store' layer inputs, or 'replay' the forward pass"})
    guess: str = field(default="random", metadata={"help": "'random', 'momentum' (weights) or 'local' (activations)"})
    decay: float = field(default=0.9, metadata={"help": "momentum guess: decay of the running mean of estimates, in [0, 1)"})

    def __post_init__(self) -> None:
        require(self.space in {"weights", "activations"}, "space", self.space, "'weights' or 'activations'")
        least = 0 if self.guess != "random" else 1
        require(isinstance(self.tangents, int) and self.tangents >= least, "tangents", self.tangents, f"a whole number >= {least}")
        require(self.noise in {"normal", "sign"}, "noise", self.noise, "'normal' or 'sign'")
        require(self.rank is None or self.rank >= 1, "rank", self.rank, "None or a whole number >= 1")
        require(self.chunk is None or self.chunk >= 1, "chunk", self.chunk, "None or a whole number >= 1")
        require(self.combine in {"mean", "orthogonal"}, "combine", self.combine, "'mean' or 'orthogonal'")
        require(self.memory in {"store", "replay"}, "memory", self.memory, "'store' or 'replay'")
        require(self.guess in {"random", "momentum", "local"}, "guess", self.guess, "'random', 'momentum' or 'local'")
        require(0 <= self.decay < 1, "decay", self.decay, "in [0, 1)")
        if self.space == "activations":
            for name, value, plain in (("rank", self.rank, None), ("combine", self.combine, "mean")):
                require(value == plain, name, value, f"{plain!r} with space='activations'; it belongs to space='weights'")
            require(self.guess != "momentum", "guess", self.guess, "'random' or 'local' with space='activations'")
        else:
            require(self.guess != "local", "guess", self.guess, "'random' or 'momentum' with space='weights'")
            require(self.memory == "store", "memory", self.memory, "'store' with space='weights', which keeps no layer inputs")
        if self.guess == "momentum":
            require(self.rank is None, "rank", self.rank, "None beside guess='momentum'")
            require(self.combine == "mean", "combine", self.combine, "'mean' beside guess='momentum'")
        if self.rescale and self.combine != "orthogonal":
            raise SettingError("rescale=True is not allowed with combine='mean', which is unbiased already; use combine='orthogonal'.")

    @property
    def name(self) -> str:
        return "forward"

    @property
    def needs(self) -> Needs:
        return Needs.TANGENT

    @property
    def split(self) -> Split:
        return Split.DATA

    @property
    def bias(self) -> Bias:
        projected = self.combine == "orthogonal" and not self.rescale
        return Bias.GUIDED if projected or self.tangents == 0 else Bias.UNBIASED

    @property
    def source(self) -> str:
        return "Baydin et al. 2022, arXiv 2202.08587" if self.space == "weights" else "Ren et al. 2023, arXiv 2210.03310, section 3"

    def aux(self, problem: Problem, key: Key) -> Tree:
        """With guess='local': one linear head a layer, [classes, channels], started small."""
        if self.guess != "local":
            return {}
        weights = [(name, p) for name, p in problem.params().items() if p.ndim >= 2]
        classes = problem.classes or (weights[-1][1].shape[0] if weights else 0)
        if len(weights) < 2 or weights[-1][1].shape[0] != classes:
            raise CapabilityError(
                "guess='local' needs at least two parametric layers, the last of which gives the model's [N, classes] output; use guess='random'."
            )
        heads = {}
        for name, weight in weights[:-1]:
            drawn = Dense(key.fold("guess"), PREFIX + name, weight.new_empty(classes, weight.shape[0]), [0], "normal")
            heads[PREFIX + name] = drawn.dense()[0] * weight.shape[0] ** -0.5
        return heads

    def init(self, problem: Problem, params: Tree, key: Key) -> Tree:
        if self.guess != "momentum":
            return {}
        return {f"guide.{name}": torch.zeros_like(value) for name, value in params.items()}

    def estimate(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key, world: World) -> Estimate:
        params = {name: value.detach() for name, value in params.items()}
        run = self.through_weights if self.space == "weights" else self.through_activations
        with torch.enable_grad():  # nothing requires grad, so nothing is recorded; the model's own no_grad keeps its meaning
            estimate = run(problem, params, state, batch, key)
        scratch.turn()
        return estimate

    def chunks(self) -> Iterator[range]:
        """Member numbers, `chunk` at a time; one empty range where there are only guesses."""
        size = self.chunk or max(1, self.tangents)
        yield from (range(start, min(start + size, self.tangents)) for start in range(0, max(1, self.tangents), size))

    # -- weight space ------------------------------------------------------------------------------------------------------------

    def through_weights(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key) -> Estimate:
        loss: Tensor | None = None
        buffers: Tree = {}
        slopes: list[Tensor] = []
        drawn: list[dict[str, Any]] = []
        notes = Notes()
        examples = problem.batch_size_of(batch)
        for number, members in enumerate(self.chunks()):
            lead = number == 0 and self.guess == "momentum"
            moves = self.moves(params, state, members, key, lead=lead)
            trace = Trace(len(members) + lead)
            duals: Tree = {name: Dual(value, None, trace, moves[name]) for name, value in params.items()}
            fresh = problem.fresh_buffers()
            with AddressedSamplers(key.fold("samplers"), first=batch.first, examples=examples), following_custom_functions():
                value = problem.loss(duals, batch, fresh)
            if loss is None:
                loss, buffers = primal_of(value).detach(), fresh
            slopes.append(value.tangent if isinstance(value, Dual) else value.new_zeros(trace.members))  # [k]
            drawn.append(moves)
            notes.add(trace)
        assert loss is not None
        coefficients = self.combined(slopes, drawn, params)
        grads = Combined(drawn, coefficients)
        metrics = notes.metrics(loss, forwards=len(drawn) + self.tangents + (self.guess == "momentum"))
        return Estimate(loss, grads, self.next_state(state, grads), metrics, buffers)

    def moves(self, params: Tree, state: Tree, members: Sequence[int], key: Key, *, lead: bool) -> dict[str, Any]:
        """K directions for every parameter."""
        if self.guess != "momentum":
            moves = {name: directions(key, name, value, members, law=self.noise, rank=self.rank) for name, value in params.items()}
            draw_together(moves, key, members, self.noise)
            return moves
        norm = torch.stack([state[f"guide.{name}"].double().square().sum() for name in params]).sum().sqrt().clamp_min(1e-30)
        base = {name: Dense(key, name, value, members, self.noise) for name, value in params.items()}
        guide = {name: (state[f"guide.{name}"].double() / norm).to(value.dtype) for name, value in params.items()}
        overlap = torch.stack([base[name].dense().flatten(1).double() @ guide[name].flatten().double() for name in params]).sum(0)
        return {name: Steered(base[name], guide[name], overlap, lead=lead) for name in params}

    def combined(self, slopes: list[Tensor], drawn: list[dict[str, Any]], params: Tree) -> list[Tensor]:
        """The coefficient of every direction, chunk by chunk."""
        if self.combine == "mean":
            scale = max(1, self.tangents)
            if self.guess != "momentum":
                return [slope / scale for slope in slopes]
            first = torch.cat([slopes[0][:1], slopes[0][1:] / scale])
            return [first, *(slope / scale for slope in slopes[1:])]
        used = [name for name in params if any(moves[name].used for moves in drawn)]
        gram = torch.stack([self.gram([moves[name] for moves in drawn]) for name in used]).sum(0)
        slope = torch.cat(slopes).double()
        finite = torch.isfinite(slope).all()  # the solvers stop at NaN with errors of their own
        slope = slope.nan_to_num(0.0, 0.0, 0.0)
        solved = torch.linalg.lstsq(gram, slope[:, None], driver="gelsd").solution[:, 0] if gram.device.type == "cpu" else torch.linalg.pinv(gram) @ slope
        solved = solved.where(finite, torch.nan)
        if self.rescale:
            size = sum(params[name].numel() for name in used)
            solved = solved * max(1.0, size / len(slope))
        return list(solved.to(slopes[0].dtype).split([len(s) for s in slopes]))

    def gram(self, parts: list[Any]) -> Tensor:
        """⟨V_i, V_j⟩ over all K directions of one tensor, whose chunks are `parts`; in float64."""
        if len(parts) == 1:
            return parts[0].gram()
        vectors = torch.cat([part.dense().flatten(1) for part in parts]).double()
        return vectors @ vectors.T

    def next_state(self, state: Tree, grads: Mapping[str, Tensor]) -> Tree:
        if self.guess != "momentum":
            return state
        kept = {}
        for name, value in state.items():
            grad = grads.get(name.removeprefix("guide."))
            kept[name] = value if grad is None else self.decay * value + (1 - self.decay) * grad
        return kept

    # -- activation space --------------------------------------------------------------------------------------------------------

    def through_activations(self, problem: Problem, params: Tree, state: Tree, batch: Batch, key: Key) -> Estimate:
        heads = {name: value for name, value in params.items() if name.startswith(PREFIX)}
        weights = {name: value for name, value in params.items() if name not in heads}
        examples = problem.batch_size_of(batch)
        loss: Tensor | None = None
        buffers: Tree = {}
        grads: Tree = {}
        notes = Notes()
        mode = getattr(getattr(problem, "model", None), "training", True)  # batch norm mixes examples in one mode and not in the other
        independent = problem.recall(("independent rows", mode, examples), lambda: independent_rows(problem, weights, batch, key))
        for number, members in enumerate(self.chunks()):
            guide = self.guide(problem, weights, heads, batch, examples)
            trace = ActivityTrace(
                key,
                members,
                law=self.noise,
                examples=examples,
                first=batch.first,
                store=self.memory == "store",
                guide=guide,
                lead=number == 0,
                scale=self.tangents,
                grads=grads,
            )
            trace.rows_are_examples = independent
            fresh = problem.fresh_buffers()
            with AddressedSamplers(key.fold("samplers"), first=batch.first, examples=examples), following_custom_functions():
                value = per_example(problem.losses(trace.parameters(weights), batch, fresh))
            if loss is None:
                loss, buffers = primal_of(value).detach().mean(), fresh
            trace.settle(value.tangent if isinstance(value, Dual) else value.new_zeros(trace.members, *value.shape))
            del value
            if self.memory == "replay":
                trace.begin_replay()
                with AddressedSamplers(key.fold("samplers"), first=batch.first, examples=examples), following_custom_functions():
                    per_example(problem.losses(trace.parameters(weights), batch, problem.fresh_buffers()))
            trace.gradients()
            if guide is not None:
                grads.update({name: grad.to(heads[name].dtype) for name, grad in guide.grads.items()})
            notes.add(trace)
        assert loss is not None
        guides = len(heads) + 1 if heads else 0
        passes = len(list(self.chunks()))
        metrics = notes.metrics(loss, forwards=passes * (1 + (self.memory == "replay")) + self.tangents + guides)
        return Estimate(loss, grads, state, metrics, buffers)

    def guide(self, problem: Problem, weights: Tree, heads: Tree, batch: Batch, examples: int) -> Guide | None:
        if self.guess != "local":
            return None
        last = [name for name, value in weights.items() if value.ndim >= 2][-1]

        def score(logits: Tensor) -> Tensor:
            try:
                each = problem.score(logits, batch.targets)
            except (IndexError, KeyError, TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError) as error:
                raise CapabilityError(
                    f"guess='local' hands the loss a layer's [N, classes] tensor for the model's outputs, which it does not take ({error}); use guess='random'."
                ) from error
            if each.shape[0] != examples:
                raise CapabilityError("guess='local' needs a loss that is a mean of the examples' own; this one sees the batch as a whole. Use guess='random'.")
            return each

        return Guide({name.removeprefix(PREFIX): head for name, head in heads.items()}, last, score, examples)


class Combined(Mapping[str, Tensor]):
    """ĝ = Σ_k c_k V_k, made tensor by tensor when asked for; parameters that no operation touched are left out."""

    def __init__(self, drawn: list[dict[str, Directions]], coefficients: list[Tensor]):
        self.drawn, self.coefficients = drawn, coefficients
        self.names = [name for name in drawn[0] if any(moves[name].used for moves in drawn)]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        pairs = iter(zip(self.drawn, self.coefficients, strict=True))
        first, coefficients = next(pairs)
        result = first[name].combine(coefficients)
        for moves, coefficients in pairs:
            result += moves[name].combine(coefficients)
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Notes:
    """What the traces of a step noted, added up."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, trace: Trace) -> None:
        for name, count in trace.fallbacks.items():
            rung = name.split(":", 1)[0]
            if rung != "reason":
                self.counts[f"fallback_{rung}"] = self.counts.get(f"fallback_{rung}", 0) + count
        if isinstance(trace, ActivityTrace):
            self.counts["fallback_weight_tangents"] = self.counts.get("fallback_weight_tangents", 0) + len(trace.weights)
            self.counts["coefficient_per_batch"] = self.counts.get("coefficient_per_batch", 0) + trace.by_batch

    def metrics(self, loss: Tensor, *, forwards: int) -> dict[str, Tensor]:
        """0-d tensors on the loss's device."""
        counts = {"forwards": forwards, "backwards": 0, **self.counts}
        return {name: torch.tensor(count, device=loss.device) for name, count in counts.items()}
