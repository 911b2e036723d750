"""The matrix-free solvers beside scipy's, and the nonlinear ones on problems with known answers."""

import pytest
import torch
from scipy.sparse import linalg as scipy_linalg

from altgrad.errors import SettingError, SingularError
from altgrad.fixed_point import METHODS, Goal, Newton, method
from altgrad.linear_solvers import bicgstab, cg, gmres, normal_cg

KIND = {"dtype": torch.float64}
SIZE = 512


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **KIND)


def system(symmetric, radius):
    """1 − Wᵀ, W of the given spectral radius."""
    if symmetric:
        basis = torch.linalg.qr(drawn(SIZE, SIZE))[0]
        return torch.eye(SIZE, **KIND) - basis @ torch.diag(torch.linspace(-radius, radius, SIZE, **KIND)) @ basis.T
    w = drawn(SIZE, SIZE)
    return torch.eye(SIZE, **KIND) - w.T * radius / torch.linalg.eigvals(w).abs().max()


@pytest.mark.parametrize("radius", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_are_at_most_a_tenth_above_scipys(symmetric, radius):
    matrix, b = system(symmetric, radius), drawn(SIZE, seed=1)

    def theirs(solver, **settings):
        used = []
        operator = scipy_linalg.LinearOperator((SIZE, SIZE), matvec=lambda v: used.append(1) or matrix.numpy() @ v, dtype=float)
        solver(operator, b.numpy(), rtol=1e-6, **settings)
        return len(used)

    x, outcome = gmres(lambda v: v @ matrix.T, b, tol=1e-6, max_steps=SIZE, restart=200)
    assert bool(outcome.converged)
    assert float((b - matrix @ x).norm() / b.norm()) <= 1e-6
    assert outcome.products <= 160
    assert outcome.products <= 1.1 * theirs(scipy_linalg.gmres, restart=200)
    if symmetric:
        x, outcome = cg(lambda v: v @ matrix.T, b, tol=1e-6, max_steps=SIZE)
        assert float((b - matrix @ x).norm() / b.norm()) <= 1e-6
        assert outcome.products <= 1.1 * theirs(scipy_linalg.cg)


def batch():
    """Systems of three difficulties, one of them zero on the right."""
    matrices = torch.stack([torch.eye(20, **KIND) * scale + (part @ part.T) / 20 for scale, part in zip((5.0, 0.5, 0.1), drawn(3, 20, 20), strict=True)])
    b = drawn(3, 20, seed=1)
    b[1] = 0
    return matrices, b


SOLVERS = {
    "cg": lambda apply, b, tol, steps: cg(apply, b, tol=tol, max_steps=steps),
    "gmres": lambda apply, b, tol, steps: gmres(apply, b, tol=tol, max_steps=steps),
    "gmres(5)": lambda apply, b, tol, steps: gmres(apply, b, tol=tol, max_steps=steps, restart=5),
    "bicgstab": lambda apply, b, tol, steps: bicgstab(apply, b, tol=tol, max_steps=steps),
    "normal-cg": lambda apply, b, tol, steps: normal_cg(apply, apply, b, tol=tol, max_steps=steps),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_each_system_of_a_batch_is_solved_and_stops_by_itself(solver):
    matrices, b = batch()
    x, outcome = solver(lambda v: (matrices @ v.unsqueeze(-1)).squeeze(-1), b, 1e-10, 400)
    assert torch.allclose(x, torch.linalg.solve(matrices, b.unsqueeze(-1)).squeeze(-1), rtol=0, atol=1e-8)
    assert outcome.converged.tolist() == [True, True, True]
    assert outcome.iterations[1] == 0
    assert outcome.iterations[0] < outcome.iterations[2]


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_residual_is_the_true_one_when_steps_run_out(solver):
    matrices, b = batch()

    def apply(v):
        return (matrices @ v.unsqueeze(-1)).squeeze(-1)

    x, outcome = solver(apply, b, 1e-10, 3)
    true = (b - apply(x)).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-300)
    assert torch.allclose(outcome.residual, true, rtol=1e-10)
    assert outcome.converged.tolist() == [False, True, False]


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_singular_system_is_not_called_converged(solver):
    _, outcome = solver(lambda v: v * torch.tensor([1.0, 0.0], **KIND), torch.ones(2, **KIND), 1e-8, 50)
    assert not bool(outcome.converged)
    assert float(outcome.residual) >= 0.7


def test_settings_out_of_range_are_named():
    with pytest.raises(SettingError, match="restart=0"):
        gmres(lambda v: v, torch.ones(2), tol=1e-3, max_steps=5, restart=0)
    with pytest.raises(SettingError, match="tol=0"):
        cg(lambda v: v, torch.ones(2), tol=0, max_steps=5)
    with pytest.raises(SettingError, match="Did you mean 'anderson'"):
        method("andersen")


@pytest.mark.parametrize("name", ["newton", "newton-krylov", "broyden", "anderson"])
def test_a_rotation_that_plain_iteration_never_solves_is_solved(name):
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], **KIND)
    shift = torch.tensor([[1.0, 2.0], [0.5, 0.0]], **KIND)
    goal = Goal(1e-12, 60, True)
    x, outcome = METHODS[name].solve(lambda x: x @ turn.T + shift - x, torch.zeros(2, 2, **KIND), goal)
    assert torch.allclose(x, shift @ torch.linalg.inv(torch.eye(2, **KIND) - turn).T, atol=1e-10)
    assert bool(outcome.converged.all())
    _, plain = METHODS["iteration"].solve(lambda x: x @ turn.T + shift - x, torch.zeros(2, 2, **KIND), goal)
    assert not bool(plain.converged.any())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rate", [0.9, 0.99])
def test_slow_contractions_are_solved_to_the_tolerance(name, rate):
    x, outcome = METHODS[name].solve(lambda x: rate * x.sin() + 1 - x, torch.zeros(1, **KIND), Goal(1e-10, 5000, True))
    assert bool(outcome.converged)
    assert float((rate * x.sin() + 1 - x).abs()) <= 1e-9


def test_newton_leaves_its_factors_and_names_a_singular_matrix():
    _, outcome = Newton().solve(lambda x: x**2 - 2, torch.ones(1, **KIND), Goal(1e-12, 50, False))
    assert outcome.factor[0].shape == (1, 1)
    with pytest.raises(SingularError, match="an iterate of Newton's method"):
        Newton().solve(lambda x: x**2 - 2, torch.zeros(1, **KIND), Goal(1e-12, 50, False))
