"""Conditions of optimality, projections and proximal operators: derivatives beside closed forms and finite differences, active sets included."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from altgrad.errors import CapabilityError, SettingError, ShapeError
from altgrad.implicit import (
    fixed_point,
    kkt,
    mirror_descent,
    project_box,
    project_l1_ball,
    project_l2_ball,
    project_nonnegative,
    project_simplex,
    projected_gradient,
    prox_elastic_net,
    prox_group_lasso,
    prox_l1,
    proximal_gradient,
    root,
    stationary,
)

KIND = {"dtype": torch.float64}


def number(value):
    return torch.tensor(value, **KIND)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **KIND)


def apart(found, wanted):
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


POINTS = drawn(4, 6)
OPERATORS = {
    "simplex": (project_simplex, (drawn(4, seed=1).abs() + 0.5,)),
    "l2 ball": (project_l2_ball, (torch.tensor([0.5, 1.5, 2.5, 9.0], **KIND),)),
    "l1 ball": (project_l1_ball, (torch.tensor([0.5, 2.0, 4.0, 90.0], **KIND),)),
    "box": (project_box, (-drawn(6, seed=1).abs(), drawn(6, seed=2).abs())),
    "nonnegative": (project_nonnegative, ()),
    "l1": (prox_l1, (drawn(6, seed=1).abs(),)),
    "elastic net": (prox_elastic_net, (drawn(6, seed=1).abs(), number(0.7))),
    "group lasso": (prox_group_lasso, (torch.tensor([0.3, 1.0, 2.0, 9.0], **KIND),)),
}


@pytest.mark.parametrize(("operator", "sizes"), OPERATORS.values(), ids=OPERATORS)
def test_both_derivatives_of_an_operator_are_those_of_finite_differences(operator, sizes):
    arguments = [tensor.clone().requires_grad_() for tensor in (POINTS, *sizes)]
    assert torch.autograd.gradcheck(operator, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(operator, arguments)


@pytest.mark.parametrize(("operator", "sizes"), OPERATORS.values(), ids=OPERATORS)
def test_an_operator_is_the_same_under_every_transform(operator, sizes):
    assert torch.allclose(jacrev(operator)(POINTS, *sizes), jacfwd(operator)(POINTS, *sizes), rtol=0, atol=1e-14)
    dims = tuple(0 if size.shape == (4,) else None for size in sizes)
    assert torch.equal(vmap(operator, (0, *dims))(POINTS, *sizes), operator(POINTS, *sizes))


@pytest.mark.parametrize(("operator", "sizes"), OPERATORS.values(), ids=OPERATORS)
def test_two_derivatives_of_an_operator_are_finite_at_zero(operator, sizes):
    zero = torch.zeros_like(POINTS)
    assert bool(jacrev(operator)(zero, *sizes).isfinite().all())
    assert bool(hessian(lambda v: operator(v, *sizes).square().sum())(zero).isfinite().all())


@pytest.mark.parametrize(
    ("operator", "sizes", "penalty"),
    [
        (prox_l1, (0.4,), lambda x: 0.4 * x.abs().sum(-1)),
        (prox_elastic_net, (0.4, 0.7), lambda x: 0.4 * x.abs().sum(-1) + 0.35 * x.square().sum(-1)),
        (prox_group_lasso, (0.9,), lambda x: 0.9 * x.norm(dim=-1)),
    ],
    ids=["l1", "elastic net", "group lasso"],
)
def test_a_proximal_operator_finds_the_minimum_it_is_named_for(operator, sizes, penalty):
    best = operator(POINTS, *sizes)
    others = best + 0.05 * drawn(500, 4, 6, seed=3)
    assert bool(((others - POINTS).square().sum(-1) / 2 + penalty(others) >= (best - POINTS).square().sum(-1) / 2 + penalty(best)).all())


@pytest.mark.parametrize("name", ["simplex", "l2 ball", "l1 ball"])
def test_a_projection_is_the_nearest_point_of_its_set(name):
    operator, (size,) = OPERATORS[name]
    best = operator(POINTS, size)
    inside = operator(5 * drawn(300, 4, 6, seed=4), size)  # points of the set
    assert bool(((POINTS - best) * (inside - best)).sum(-1).max() <= 1e-12)  # no angle below a right one
    assert torch.allclose(operator(best, size), best, atol=1e-14)


def test_the_jacobian_of_the_simplex_projection_is_its_closed_form():
    for v in 0.4 * POINTS:
        s = (project_simplex(v) > 0).to(v.dtype)
        assert 1 < int(s.sum()) < 6
        wanted = torch.diag(s) - torch.outer(s, s) / s.sum()
        for found in (jacrev(project_simplex)(v), jacfwd(project_simplex)(v)):
            assert torch.allclose(found, wanted, rtol=0, atol=1e-15)


def test_at_a_kink_the_derivative_is_that_of_the_free_side():
    assert float(grad(project_nonnegative)(number(0.0))) == 1
    assert jacrev(project_box)(number(1.0).reshape(1), 0.0, 1.0).item() == 1
    assert jacrev(prox_l1)(number(0.5).reshape(1), 0.5).item() == 1
    assert torch.equal(jacrev(project_l2_ball)(torch.tensor([0.6, 0.8], **KIND), 1.0), torch.eye(2, **KIND))
    assert torch.equal(jacrev(project_l1_ball)(torch.tensor([0.25, -0.75], **KIND), 1.0), torch.eye(2, **KIND))


# Conditions


CURVE = drawn(5, 5) @ drawn(5, 5).T / 5 + torch.eye(5, **KIND)
LINEAR = drawn(5, seed=1)
STEP = float(1 / torch.linalg.eigvalsh(CURVE)[-1])


def energy(x, t):
    return x @ CURVE @ x / 2 - t * (LINEAR @ x)


def test_a_stationary_point_has_its_closed_form_and_derivative():
    def best(t):
        return root(stationary(energy), torch.zeros(5, **KIND), t)

    wanted = torch.linalg.solve(CURVE, LINEAR)
    assert apart(best(number(3.0)), 3 * wanted) <= 1e-14
    for direction in (jacrev, jacfwd):
        assert apart(direction(best)(number(3.0)), wanted) <= 1e-14


def test_a_stationary_point_takes_pytrees_and_one_objective_for_each_example():
    rates = torch.tensor([1.0, 2.0], **KIND).requires_grad_()

    def each(x):
        return (x["a"] - rates).square() + (x["b"] - rates[:, None]).square().sum(-1)

    x = root(stationary(each), {"a": torch.zeros(2, **KIND), "b": torch.zeros(2, 3, **KIND)}, batch_dims=1)
    assert apart(x["b"], rates[:, None].expand(2, 3)) <= 1e-14
    (x["a"].sum() + x["b"].sum()).backward()
    assert rates.grad.tolist() == pytest.approx([4, 4], rel=1e-13)


def test_kkt_of_an_equality_programme_is_its_closed_form():
    rows, level = drawn(2, 5, seed=2), drawn(2, seed=3)
    conditions = kkt(energy, equality=lambda x, t: rows @ x - t * level)
    found = root(conditions, {"x": torch.zeros(5, **KIND), "equality": torch.zeros(2, **KIND)}, number(2.0))
    whole = torch.cat([torch.cat([CURVE, rows.T], 1), torch.cat([rows, torch.zeros(2, 2, **KIND)], 1)])
    wanted = torch.linalg.solve(whole, torch.cat([LINEAR, level]))
    assert apart(torch.cat([found["x"], found["equality"]]), 2 * wanted) <= 1e-13
    slope = jacrev(lambda t: root(conditions, {"x": torch.zeros(5, **KIND), "equality": torch.zeros(2, **KIND)}, t)["x"])(number(2.0))
    assert apart(slope, wanted[:5]) <= 1e-13


def test_kkt_tells_active_from_inactive_inequalities():
    conditions = kkt(lambda x, t: ((x - t) ** 2).sum() / 2, inequality=lambda x, t: x - torch.tensor([1.0, 5.0], **KIND))
    start = {"x": torch.tensor([1.1, 1.9], **KIND), "inequality": torch.tensor([0.9, 0.1], **KIND)}
    t = torch.tensor([2.0, 2.0], **KIND)
    found = root(conditions, start, t)
    assert found["x"].tolist() == pytest.approx([1, 2], rel=1e-12)
    assert found["inequality"].tolist() == pytest.approx([1, 0], abs=1e-12)
    for direction in (jacrev, jacfwd):
        assert torch.allclose(direction(lambda t: root(conditions, start, t)["x"])(t), torch.diag(torch.tensor([0.0, 1.0], **KIND)), atol=1e-12)


def test_projected_gradient_is_differentiated_on_the_active_set():
    step = projected_gradient(energy, lambda v, t: project_nonnegative(v), STEP)

    def best(t):
        return fixed_point(step, torch.zeros(5, **KIND), t)

    x = best(number(1.0))
    free = x > 0
    assert 0 < int(free.sum()) < 5
    wanted = torch.zeros(5, **KIND)
    wanted[free] = torch.linalg.solve(CURVE[free][:, free], LINEAR[free])
    assert apart(x, wanted) <= 1e-9
    assert apart(jacrev(best)(number(1.0)), wanted) <= 1e-9
    assert apart(jacfwd(best)(number(1.0)), wanted) <= 1e-9


def test_the_fixed_point_of_a_proximal_gradient_does_not_depend_on_its_step():
    def best(step, adjoint="auto"):
        return fixed_point(proximal_gradient(energy, lambda v, step, t: prox_l1(v, 0.3 * step), step), torch.zeros(5, **KIND), number(1.0), adjoint=adjoint)

    assert apart(best(STEP), best(STEP / 3)) <= 1e-9
    assert float(jacrev(best)(number(STEP)).abs().max()) <= 1e-9
    assert float(jacfwd(best)(number(STEP)).abs().max()) <= 1e-9


def test_mirror_descent_on_the_simplex_agrees_with_projected_gradient():
    weight = drawn(5, seed=5)

    def distance(x, t):  # its minimum is inside
        return (x - torch.softmax(t * weight, 0)).square().sum() / 2

    start = torch.full((5,), 0.2, **KIND)
    mirror = mirror_descent(distance, lambda v, t: torch.softmax(v, -1), torch.log, 1.0)
    plain = projected_gradient(distance, lambda v, t: project_simplex(v), 0.5)
    t = number(0.7)
    assert apart(fixed_point(mirror, start, t), torch.softmax(t * weight, 0)) <= 1e-8
    wanted = jacrev(lambda t: torch.softmax(t * weight, 0))(t)
    for step in (mirror, plain):
        assert apart(jacrev(lambda t: fixed_point(step, start, t))(t), wanted) <= 1e-7


# Where derivatives meet


def nested(t):
    return root(lambda x: x + root(lambda y: y**3 + y - t * x, number(0.5)) - 2, number(0.7))


def test_nested_roots_under_nested_transforms_say_what_to_do():
    for transform in (lambda f: grad(grad(f)), hessian):
        with pytest.raises(CapabilityError, match="create_graph=True"):
            transform(nested)(number(1.3))


def test_nested_roots_have_the_second_derivative_that_the_error_promises():
    t = number(1.3).requires_grad_()
    (slope,) = torch.autograd.grad(nested(t), t, create_graph=True)
    exact = (grad(nested)(number(1.3 + 1e-5)) - grad(nested)(number(1.3 - 1e-5))) / 2e-5
    assert float(torch.autograd.grad(slope, t)[0]) == pytest.approx(float(exact), rel=1e-8)


@pytest.mark.parametrize("adjoint", ["jfb", "neumann(3)", "neumann(80)", "phantom(10,0.5)", "truncated(5)"])
def test_an_approximate_adjoint_reports_the_residual_of_its_answer(adjoint):
    matrix, shift = torch.linalg.qr(drawn(20, 20))[0] * 0.7, drawn(20, seed=1).requires_grad_()
    bar = drawn(20, seed=2)
    z, info = fixed_point(lambda z: matrix @ z + shift, torch.zeros(20, **KIND), solver="iteration", adjoint=adjoint, info=True)
    (u,) = torch.autograd.grad(z, shift, bar)
    assert float(info.adjoint.residual) == pytest.approx(float((bar - u + matrix.T @ u).norm() / bar.norm()), rel=1e-3, abs=1e-13)
    assert bool(info.adjoint.converged) == (adjoint == "neumann(80)")


MISTAKES = {
    "no constraint": (SettingError, "use stationary", lambda: kkt(energy)),
    "another unknown": (ShapeError, "keys x, equality", lambda: kkt(energy, equality=lambda x: x)(torch.zeros(5, **KIND))),
    "another multiplier": (
        ShapeError,
        r"multiplier in the unknown is \(3,\)",
        lambda: kkt(lambda x: x.sum(), equality=lambda x: x)({"x": torch.zeros(5, **KIND), "equality": torch.zeros(3, **KIND)}),
    ),
    "no objective": (ShapeError, "returned float", lambda: stationary(lambda x: 0.5)(torch.zeros(2, **KIND))),
    "negative step": (SettingError, "step=-1", lambda: projected_gradient(energy, project_simplex, -1)),
    "empty simplex": (SettingError, "size=0", lambda: project_simplex(POINTS, 0)),
    "box turned over": (SettingError, "low=2", lambda: project_box(POINTS, 2, 1)),
    "a number to project": (ShapeError, "at least one axis", lambda: project_simplex(number(1.0))),
    "negative threshold": (SettingError, "scale=-0.1", lambda: prox_l1(POINTS, -0.1)),
}


@pytest.mark.parametrize(("error", "message", "call"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
