"""Planted bugs of the engine implicit."""

from mutants_form import EVERYWHERE, Mutant, altered, on, patched, scaled, summed_loss

from altgrad.engines import implicit
from altgrad.engines.implicit import Implicit
from altgrad.implicit import calls
from altgrad.implicit.equation import Equation

SETTLES = ("is_exact_on_a_net_that_settles",)
SOLVE, LINEAR = calls.fixed_point, Equation.solved_linear


def one_step(function, start, **settings):
    """The derivative of one step from the solution, as in Jacobian-free backprop, called exact."""
    return SOLVE(function, start, **{**settings, "adjoint": "jfb"})


def early(function, start, **settings):
    """A solve that stops at three digits."""
    return SOLVE(function, start, **{**settings, "tol": 1e-3})


def mixed_examples(function, start, **settings):
    """The whole batch as one example: the last one to converge decides for all, and the factors are of another matrix."""
    return SOLVE(function, start, **{**settings, "tol": 1e-4, "batch_dims": 0})


def untransposed(equation, tangent, b, *, transpose):
    """A⁻¹ where A⁻ᵀ is due."""
    return LINEAR(equation, tangent, b, transpose=not transpose)


def names_dropped(found, *_):
    """The last parameter forgotten."""
    return found._replace(grads=dict(list(found.grads.items())[:-1]))


MUTANTS = [
    Mutant("implicit: wrong sign", altered(Implicit, scaled(-1)), (*SETTLES, *on("is_exact_on", *EVERYWHERE))),
    Mutant("implicit: summed loss", altered(Implicit, summed_loss), ("loss_is_the_problems_own",)),
    Mutant("implicit: one step in place of the adjoint", Implicit(), SETTLES, patched(implicit, "fixed_point", one_step)),
    Mutant("implicit: solved to three digits", Implicit(), SETTLES, patched(implicit, "fixed_point", early)),
    Mutant("implicit: stops with the batch, not the example", Implicit(), SETTLES, patched(implicit, "fixed_point", mixed_examples)),
    Mutant("implicit: A for its transpose", Implicit(), SETTLES, patched(Equation, "solved_linear", untransposed)),
    Mutant("implicit: a parameter forgotten", altered(Implicit, names_dropped), SETTLES),
    Mutant("implicit: biased adjoint reversed", altered(Implicit, scaled(-1), adjoint="jfb"), ("is_not_reversed_on_network",)),
]
