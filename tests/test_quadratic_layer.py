"""altgrad.implicit.qp beside scipy, closed forms and finite differences; and what it says of programmes without a minimum."""

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear, minimize
from torch.func import hessian, jacfwd, jacrev, vmap

from altgrad.errors import InfeasibleError, NotConvergedError, NumericsError, SettingError, ShapeError, SingularError
from altgrad.implicit import project_simplex, qp

KIND = {"dtype": torch.float64}
N, M, K = 6, 2, 5


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **KIND)


def apart(found, wanted):
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def programmes(count=3):
    """Feasible ones, some of whose inequalities are active."""
    factor = drawn(count, N, N)
    P, q = factor @ factor.mT / N + 0.1 * torch.eye(N, **KIND), drawn(count, N, seed=1)
    A, b, G = drawn(M, N, seed=2), drawn(M, seed=3), drawn(count, K, N, seed=4)
    h = (G @ torch.linalg.lstsq(A, b[:, None])[0]).squeeze(-1) + 0.3 * drawn(count, K, seed=5).abs()
    return P, q, A, b, G, h


def solved(P, q, A, b, G, h):
    return torch.cat(tuple(qp(P, q, equality=(A, b), inequality=(G, h))), -1)


def test_every_programme_of_a_batch_meets_the_conditions_of_its_minimum():
    P, q, A, b, G, h = programmes()
    x, nu, lam = qp(P, q, equality=(A, b), inequality=(G, h))
    slack = h - (G @ x[..., None])[..., 0]
    assert float(((P @ x[..., None])[..., 0] + q + nu @ A + (lam[..., None, :] @ G)[..., 0, :]).abs().max()) <= 1e-12
    assert float((x @ A.T - b).abs().max()) <= 1e-12
    assert float(slack.min()) >= -1e-12
    assert float(lam.min()) >= 0
    assert float((lam * slack).abs().max()) <= 1e-12
    assert bool((lam > 1e-3).any())
    assert bool((lam == 0).any())


def test_the_minimum_is_scipys():
    P, q, A, b, G, h = (part.numpy() for part in programmes(1))
    rules = [{"type": "eq", "fun": lambda x: A @ x - b}, {"type": "ineq", "fun": lambda x: h[0] - G[0] @ x}]
    settings = {"constraints": rules, "method": "SLSQP", "options": {"ftol": 1e-14}}
    theirs = minimize(lambda x: x @ P[0] @ x / 2 + q[0] @ x, np.zeros(N), jac=lambda x: P[0] @ x + q[0], **settings)
    assert apart(solved(*programmes(1))[0, :N], torch.tensor(theirs.x)) <= 1e-6  # SLSQP's own accuracy


def test_bounded_least_squares_are_scipys_to_rounding():
    matrix, right = drawn(12, 5), drawn(12, seed=1)
    eye = torch.eye(5, **KIND)
    ours = qp(matrix.T @ matrix, -matrix.T @ right, inequality=(torch.cat([-eye, eye]), torch.full((10,), 0.1, **KIND))).x
    assert apart(ours, torch.tensor(lsq_linear(matrix.numpy(), right.numpy(), (-0.1, 0.1), method="bvls", tol=1e-14).x)) <= 1e-12


def test_derivatives_in_all_six_arguments_are_those_of_finite_differences():
    arguments = [part.clone().requires_grad_() for part in programmes(2)]
    for index in range(6):  # one at a time: fast mode looks along one random direction of each
        one = [part if place == index else part.detach() for place, part in enumerate(arguments)]
        assert torch.autograd.gradcheck(solved, one, check_forward_ad=True, fast_mode=True)


def test_second_derivatives_are_those_of_finite_differences():
    P, q, A, b, G, h = programmes(1)
    matrices = (q[0].clone().requires_grad_(), b.clone().requires_grad_(), h[0].clone().requires_grad_(), P[0].clone().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda q, b, h, P: solved(P, q, A, b, G[0], h).square(), matrices, fast_mode=True)


def test_equalities_alone_are_their_closed_form():
    P, q, A, b, _, _ = programmes()
    whole = torch.cat([torch.cat([P, A.mT.expand(3, N, M)], -1), torch.cat([A, torch.zeros(M, M, **KIND)], -1).expand(3, M, N + M)], -2)

    def exact(q, b):
        return torch.linalg.solve(whole, torch.cat([-q, b.expand(3, M)], -1)[..., None])[..., :N, 0]

    assert apart(qp(P, q, equality=(A, b)).x, exact(q, b)) <= 1e-12
    assert apart(jacrev(lambda b: qp(P, q, equality=(A, b)).x)(b), jacrev(lambda b: exact(q, b))(b)) <= 1e-12
    assert apart(qp(P, q).x, -torch.linalg.solve(P, q[..., None])[..., 0]) <= 1e-12


def test_the_simplex_as_constraints_has_the_projections_value_and_jacobian():
    v = 0.4 * drawn(5, seed=7)
    eye, ones, none, whole = torch.eye(5, **KIND), torch.ones(1, 5, **KIND), torch.zeros(5, **KIND), torch.ones(1, **KIND)

    def projected(v):
        return qp(eye, -v, equality=(ones, whole), inequality=(-eye, none)).x

    assert torch.allclose(projected(v), project_simplex(v), rtol=0, atol=1e-13)
    assert torch.allclose(jacrev(projected)(v), jacrev(project_simplex)(v), rtol=0, atol=1e-12)
    assert torch.allclose(jacfwd(projected)(v), jacrev(project_simplex)(v), rtol=0, atol=1e-12)


def test_transforms_agree_and_nest_over_unlike_arguments():
    P, q, A, b, G, h = programmes()

    def value(q, h):
        return solved(P[0], q, A, b, G[0], h).square().sum()

    singly = torch.stack([jacrev(jacrev(lambda q: value(q, h[0])))(one) for one in q])
    assert apart(vmap(hessian(value), (0, None))(q, h[0]), singly) <= 1e-10
    grid = vmap(vmap(value, (None, 0)), (0, None))(q, h[:1] * torch.tensor([[1.0], [1.5]], **KIND))
    assert grid.shape == (3, 2)
    assert float(grid[2, 1]) == pytest.approx(float(value(q[2], 1.5 * h[0])), rel=1e-12)


def test_a_programme_does_not_depend_on_its_batch_mates():
    together, P = solved(*programmes()), programmes()
    alone = solved(P[0][1], P[1][1], P[2], P[3], P[4][1], P[5][1])
    assert torch.allclose(together[1], alone, rtol=0, atol=1e-13)


def test_float32_is_right_to_its_rounding():
    narrow = solved(*(part.float() for part in programmes()))
    assert apart(narrow.double(), solved(*programmes())) <= 1e-4


def test_a_tight_constraint_without_a_multiplier_has_no_derivative():
    q = torch.zeros(1, **KIND).requires_grad_()
    x = qp(torch.eye(1, **KIND), q, inequality=(torch.ones(1, 1, **KIND), torch.zeros(1, **KIND))).x
    assert abs(x.item()) <= 1e-5
    with pytest.raises(SingularError, match="condition estimate"):
        x.backward()


def stopped_early():
    P, q, A, b, G, h = programmes()
    return qp(P, q, equality=(A, b), inequality=(G, h), max_steps=1, strict=True)


EYE, ROW = torch.eye(2, **KIND), torch.ones(1, 2, **KIND)
ONE, TWO = torch.ones(1, **KIND), torch.zeros(2, **KIND)
MISTAKES = {
    "no point": (InfeasibleError, "no feasible point", lambda: qp(EYE, TWO, inequality=(torch.cat([ROW, -ROW]), torch.tensor([-1.0, -1.0], **KIND)))),
    "no point of a batch": (
        InfeasibleError,
        "1 of 2 quadratic programmes",
        lambda: qp(EYE, TWO, inequality=(torch.cat([ROW, -ROW]), torch.tensor([[-1.0, -1.0], [1.0, 1.0]], **KIND))),
    ),
    "no equality": (InfeasibleError, "contradict each other", lambda: qp(EYE, TWO, equality=(torch.cat([ROW, ROW]), torch.tensor([0.0, 1.0], **KIND)))),
    "the same equality twice": (SingularError, "dependent", lambda: qp(EYE, TWO, equality=(torch.cat([ROW, ROW]), torch.ones(2, **KIND)))),
    "no minimum": (InfeasibleError, "falls without bound", lambda: qp(0 * EYE, -ROW[0], inequality=(-EYE, TWO))),
    "a saddle": (NumericsError, "least eigenvalue -1.0e", lambda: qp(torch.diag(torch.tensor([1.0, -1.0], **KIND)), TWO, inequality=(ROW, ONE))),
    "too few steps": (NotConvergedError, "InteriorPoint did not converge", stopped_early),
    "P and q": (ShapeError, r"P is \(2, 2\) and q \(1,\)", lambda: qp(EYE, ONE)),
    "G and h": (ShapeError, r"inequality: G is \(1, 2\) and h \(2,\)", lambda: qp(EYE, TWO, inequality=(ROW, TWO))),
    "batches": (ShapeError, "do not broadcast", lambda: qp(EYE.expand(3, 2, 2), TWO.expand(4, 2))),
    "dtypes": (ShapeError, "A is torch.float32", lambda: qp(EYE, TWO, equality=(ROW.float(), ONE))),
    "tolerance": (SettingError, "tol=0", lambda: qp(EYE, TWO, tol=0.0)),
}


@pytest.mark.parametrize(("error", "message", "call"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
