"""Planted bugs in altgrad.implicit, each of which must fail its named test: mistakes that other libraries ship with, and those nearest to hand."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import test_implicit as implicit
import test_linear_estimators as estimators
import test_optimality as optimality
import test_quadratic_layer as quadratic
import torch

from altgrad.errors import AltgradError
from altgrad.implicit import adjoints, calls, equation, interior_point, projections, proxes, rule, safeguarded, traced
from altgrad.linear_solvers import LinearOutcome


def transposed_once(patch):
    """The adjoint solves with A where Aᵀ is meant."""
    plain = equation.Equation.solved_linear
    patch.setattr(equation.Equation, "solved_linear", lambda self, tangent, b, *, transpose: plain(self, tangent, b, transpose=not transpose))


def negated(patch):
    """The wrong sign of θ̄."""
    plain = equation.Equation.solved_linear
    patch.setattr(equation.Equation, "solved_linear", lambda self, tangent, b, *, transpose: -plain(self, tangent, b, transpose=transpose))


def fast_path_negated(patch):
    """The wrong sign of θ̄ in a first derivative by torch.autograd only."""
    plain = equation.Equation.pulled
    patch.setattr(equation.Equation, "pulled", lambda *args: tuple(-part for part in plain(*args)))


def solution_detached(patch):
    """x is kept as a constant: the second derivative loses the share that goes through it, as TorchOpt's does."""

    def setup(ctx, inputs, output):
        ctx.equation = inputs[0]
        ctx.kept = output.detach()
        ctx.save_for_backward(*inputs[2:])

    def backward(ctx, bar):
        x, theta = ctx.kept, ctx.saved_tensors
        u = rule.Inverse.run(ctx.equation, True, bar, x, *theta)
        which = [index for index in rule.floats(theta) if ctx.needs_input_grad[2 + index]]
        _, pull = rule.pullback(rule.in_parameters(ctx.equation, x, theta, which), *(theta[index] for index in which))
        bars = [None] * len(theta)
        for index, found in zip(which, pull(-u), strict=True):
            bars[index] = found
        return None, None, *bars

    patch.setattr(rule.Solution, "setup_context", staticmethod(setup))
    patch.setattr(rule.Solution, "backward", staticmethod(backward))


def silent(patch):
    """Nobody says that the adjoint did not converge."""
    patch.setattr(equation, "judge", lambda *_, **__: None)


def boasting(patch):
    """Every linear solve is called converged."""
    plain = equation.solve

    def solve(*args, **settings):
        y, info = plain(*args, **settings)
        return y, replace(info, converged=torch.ones_like(info.converged))

    patch.setattr(equation, "solve", solve)


def closed_over_forgotten(patch):
    """What F closes over gets no gradient."""
    plain = calls.closed

    def closed(function, *args):
        result, _, _ = plain(function, *args)
        return result, [], lambda values: nullcontext()

    patch.setattr(calls, "closed", closed)


def one_step_short(patch):
    """A series of one term less."""
    patch.setattr(traced, "series", lambda *args: args[1])
    patch.setattr(calls, "series", lambda equation, x, theta: traced.with_value(x, x + 0.5 * equation.function(x, theta)))


def support_of_positive_entries(patch):
    """The simplex's support taken for the positive entries."""
    patch.setattr(projections, "simplex_support", lambda v, size: v > 0)


def threshold_forgotten(patch):
    """A hard threshold for a soft one."""
    patch.setattr(proxes, "prox_l1", lambda v, scale: torch.where(v.abs() < scale, 0.0, v))


def multipliers_forgotten(patch):
    """Complementary slackness without λ: every inequality counts as active."""

    def conditions(self, z):
        x, nu, lam = self.parts(z)
        slope = interior_point.times(self.P, x) + self.q + interior_point.times(self.A.mT, nu) + interior_point.times(self.G.mT, lam)
        return torch.cat([slope, interior_point.times(self.A, x) - self.b, interior_point.times(self.G, x) - self.h], -1)

    patch.setattr(interior_point.Programme, "conditions", conditions)


def flat_directions_taken(patch):
    """Newton runs away along directions that F does not see."""
    patch.setattr(safeguarded, "SMALL", 0.0)
    patch.setattr(safeguarded, "accelerated", lambda function, x, count: x)


def residual_of_nothing(patch):
    """CG reports convergence whatever it reached."""
    patch.setattr(adjoints, "cg", lambda apply, b, **_: (0 * b, LinearOutcome(0 * b[..., 0], 0 * b[..., 0], b[..., 0] == b[..., 0], 0)))


MUTANTS = {
    "A for its transpose": (transposed_once, lambda: implicit.test_affine_map_of_200_gives_both_gradients("lu")),
    "wrong sign": (negated, lambda: implicit.test_affine_contraction_has_derivative_two("newton")),
    "wrong sign, first order": (fast_path_negated, lambda: implicit.test_affine_map_of_200_gives_both_gradients("gmres")),
    "half a second derivative": (solution_detached, lambda: implicit.test_autograd_gives_three_derivatives_with_every_adjoint("lu")),
    "silent": (silent, lambda: implicit.test_ill_conditioned_systems_are_right_or_say_so(1e6, "normal-cg", torch.float64)),
    "boasting": (boasting, lambda: implicit.test_ill_conditioned_systems_are_right_or_say_so(1e6, "normal-cg", torch.float64)),
    "residual of nothing": (residual_of_nothing, lambda: implicit.test_ill_conditioned_systems_are_right_or_say_so(1e2, "cg", torch.float64)),
    "closed-over tensors": (closed_over_forgotten, lambda: implicit.test_module_weights_and_closed_over_activations_get_gradients("auto", 0)),
    "a shorter series": (one_step_short, lambda: implicit.test_jacobian_free_is_exact_where_the_jacobian_is_zero(torch.func.grad)),
    "support": (support_of_positive_entries, optimality.test_the_jacobian_of_the_simplex_projection_is_its_closed_form),
    "hard threshold": (threshold_forgotten, lambda: estimators.test_weights_are_scikit_learns(*estimators.PROBLEMS["lasso"])),
    "all constraints active": (multipliers_forgotten, quadratic.test_the_simplex_as_constraints_has_the_projections_value_and_jacobian),
    "flat directions": (flat_directions_taken, lambda: estimators.test_lasso_with_more_features_than_examples_meets_its_conditions(0.005)),
}


@pytest.mark.filterwarnings("ignore::altgrad.errors.NotConvergedWarning")
@pytest.mark.parametrize(("plant", "test"), MUTANTS.values(), ids=MUTANTS)
def test_a_planted_bug_fails_its_test(plant, test, monkeypatch):
    plant(monkeypatch)
    with pytest.raises((AssertionError, AltgradError, RuntimeError)):  # RuntimeError: PyTorch finds nothing to differentiate
        test()
