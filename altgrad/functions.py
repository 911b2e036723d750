"""`altgrad.grad`: the shape of torch.func.grad for any scalar function, with the engine's estimate in place of the gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from altgrad import registry
from altgrad.engine import Engine, Split, Tree, fit_check
from altgrad.errors import CapabilityError, NumericsError, ShapeError
from altgrad.forward_mode import primal_of
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.world import World


class FunctionProblem(Problem):
    """A scalar function of a pytree, as a problem with one example."""

    name = "function"

    def __init__(self, function: Callable[..., Any], argnums: int, has_aux: bool):
        self.function, self.argnums, self.has_aux = function, argnums, has_aux
        self.arguments: tuple[Any, ...] = ()
        self.aux: Any = None

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tree:
        """Remember the arguments; the leaves of the one that varies, by number."""
        leaves, self.spec = tree_flatten(args[self.argnums])
        self.arguments, self.keywords = args, kwargs
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                raise ShapeError(
                    f"leaf {index} of argument {self.argnums} is {getattr(leaf, 'dtype', type(leaf).__name__)}; every leaf must be a float tensor."
                )
        self.tensors = {str(index): leaf.detach() for index, leaf in enumerate(leaves)}
        return self.tensors

    def params(self) -> Tree:
        return self.tensors

    def batch_size_of(self, batch: Batch) -> int:
        return 1

    def losses(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        return self.scalar(self.value(params))

    def objective(self, params: Tree, batch: Batch, buffers: Tree) -> Tensor:
        """The function's value; a plain number will do for rules that need no more than that."""
        value = self.value(params)
        return torch.tensor(float(value), dtype=torch.float64) if isinstance(value, (int, float)) else self.scalar(value).reshape(())

    def value(self, params: Tree) -> Any:
        """What the function returns at `params`, without its aux."""
        args = list(self.arguments)
        args[self.argnums] = tree_unflatten([params[str(index)] for index in range(len(self.tensors))], self.spec)
        value = self.function(*args, **self.keywords)
        if self.has_aux:
            value, aux = value
            self.aux = tree_map(lambda leaf: primal_of(leaf).detach() if isinstance(leaf, Tensor) else leaf, aux)
        return value

    def scalar(self, value: Any) -> Tensor:
        """`value` as [1]; ShapeError unless it is a tensor with one element."""
        if not isinstance(value, Tensor) or value.numel() != 1:
            seen = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"the function returned {seen}; it must return a scalar tensor{' first' if self.has_aux else ''}.")
        return value.reshape(1)


def value_and_grad(
    function: Callable[..., Any], argnums: int = 0, *, engine: str | Engine = "forward", has_aux: bool = False, **settings: Any
) -> Callable[..., Any]:
    """(f(x), ĝ(x)) with the engine's estimate ĝ.

    Args:
        function: a scalar function of tensors or pytrees.
        argnums: which argument varies.
        engine: an engine that needs no more than VALUE, TANGENT or REVERSE.
        has_aux: the function returns (value, aux); then so does the result: ((value, aux), grad), aux as it is at x itself.
        settings: the engine's settings.

    Returns:
        A function of the same arguments and `key=altgrad.Key(...)`, the address of the noise (the same key gives the same estimate).
    """
    rule: Engine = registry.engine(engine, settings) if isinstance(engine, str) else engine

    def estimate(*args: Any, key: Key | None = None, **kwargs: Any) -> Any:
        problem = FunctionProblem(function, argnums, has_aux)
        params = problem.bind(args, kwargs)
        fit_check(rule, problem, alternatives=registry.needs)
        key = key or Key(0)
        own = rule.aux(problem, key)
        trained = {**params, **own}
        found = rule.estimate(problem, trained, rule.init(problem, trained, key), Batch((), ()), key, World())
        if has_aux and rule.split is Split.POPULATION:  # so far it is a perturbed member's
            with torch.no_grad():
                problem.value(params)
        if not bool(torch.isfinite(found.loss)):
            raise NumericsError(f"the function's value is {float(found.loss)} in {rule.name}; its gradient cannot be estimated there.")
        if own and not any(name in found.grads for name in params):
            raise CapabilityError(
                f"engine {rule.name} trains {', '.join(sorted(own))} in place of the function's arguments, so it gives no gradient of them; "
                "use it with altgrad.Learner, or another engine here."
            )
        grads = tree_unflatten([found.grads[name] if name in found.grads else torch.zeros_like(leaf) for name, leaf in params.items()], problem.spec)
        return ((found.loss, problem.aux) if has_aux else found.loss), grads

    return estimate


def grad(function: Callable[..., Any], argnums: int = 0, *, engine: str | Engine = "forward", has_aux: bool = False, **settings: Any) -> Callable[..., Any]:
    """ĝ(x), an estimate of ∇f(x) in the shape of x; arguments as in `value_and_grad`. With has_aux: (ĝ, aux)."""
    both = value_and_grad(function, argnums, engine=engine, has_aux=has_aux, **settings)

    def estimate(*args: Any, key: Key | None = None, **kwargs: Any) -> Any:
        value, grads = both(*args, key=key, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return estimate
