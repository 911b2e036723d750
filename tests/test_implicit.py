"""altgrad.implicit: derivatives of roots and fixed points against closed forms, in every direction and order; and never silently wrong."""

import math
import warnings

import pytest
import torch
from sklearn.datasets import make_regression
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import altgrad
from altgrad.errors import CapabilityError, NotConvergedError, NotConvergedWarning, SettingError, ShapeError, SingularError
from altgrad.fixed_point import Anderson, Iteration
from altgrad.implicit import custom_fixed_point, custom_root, fixed_point, root

KIND = {"dtype": torch.float64}
EXACT = ("auto", "lu", "cholesky", "cg", "gmres", "bicgstab", "normal-cg")
SOLVERS = ("newton", "newton-krylov", "broyden", "anderson", "iteration")


def number(value):
    return torch.tensor(value, **KIND)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **KIND)


def apart(found, wanted):
    """The largest difference relative to the largest wanted value."""
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


# Ridge regression x = (XᵀX + nλ)⁻¹ Xᵀy: its k-th derivative in λ is (−n)ᵏ k! (XᵀX + nλ)⁻⁽ᵏ⁺¹⁾ Xᵀy.

X, Y = (torch.tensor(part, **KIND) for part in make_regression(n_samples=10, n_features=3, n_informative=3, random_state=0))
VALUES, VECTORS = torch.linalg.eigh(X.T @ X)


def ridge(lam, **settings):
    return root(lambda x, lam: X.T @ (X @ x - Y) + 10 * lam * x, torch.zeros(3, **KIND), lam, **settings)


def ridge_derivative(lam, order):
    scale = (-10.0) ** order * math.factorial(order) / (VALUES + 10 * lam[..., None]) ** (order + 1)
    return (scale * (VECTORS.T @ (X.T @ Y))) @ VECTORS.T


TRANSFORMS = {
    "reverse": (1, jacrev),
    "forward": (1, jacfwd),
    "reverse over reverse": (2, lambda f: jacrev(jacrev(f))),
    "forward over reverse": (2, hessian),
    "reverse over forward": (2, lambda f: jacrev(jacfwd(f))),
    "reverse three times": (3, lambda f: jacrev(jacrev(jacrev(f)))),
    "forward over reverse twice": (3, lambda f: jacfwd(jacrev(jacrev(f)))),
}


@pytest.mark.parametrize(("order", "transform"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_ridge_derivatives_are_right_to_rounding(order, transform):
    lam = number(5.0)
    assert apart(transform(ridge)(lam), ridge_derivative(lam, order)) <= (1e-14 if order == 1 else 1e-12)


@pytest.mark.parametrize(("order", "transform"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_ridge_derivatives_are_right_under_vmap(order, transform):
    lam = torch.tensor([5.0, 1.0, 0.1], **KIND)
    assert apart(vmap(transform(ridge))(lam), ridge_derivative(lam, order)) <= 1e-12


@pytest.mark.parametrize("adjoint", [*EXACT, "unroll", "truncated(2)"])
def test_autograd_gives_three_derivatives_with_every_adjoint(adjoint):
    lam = number(5.0).requires_grad_()
    value = ridge(lam, adjoint=adjoint, adjoint_tol=1e-14)[0]
    for order in (1, 2, 3):
        (value,) = torch.autograd.grad(value, lam, create_graph=True)
        assert apart(value, ridge_derivative(lam.detach(), order)[0]) <= 1e-10


def test_float32_is_right_to_its_rounding():
    X32, Y32 = X.float(), Y.float()
    found = jacrev(lambda lam: root(lambda x: X32.T @ (X32 @ x - Y32) + 10 * lam * x, torch.zeros(3), strict=True))(torch.tensor(5.0))
    assert apart(found.double(), ridge_derivative(number(5.0), 1)) <= 5e-7


def test_gradcheck_and_gradgradcheck_pass():
    matrix, start = (drawn(3, 3) * 0.2).requires_grad_(), drawn(2, 3, seed=1).requires_grad_()

    def solution(matrix, shift):
        return fixed_point(lambda z: torch.tanh(z @ matrix + shift), torch.zeros(2, 3, **KIND), batch_dims=1, tol=1e-14)

    assert torch.autograd.gradcheck(solution, (matrix, start), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solution, (matrix, start))


# Known values


@pytest.mark.parametrize("solver", SOLVERS)
def test_cosine_has_its_known_fixed_point_and_two_derivatives(solver):
    def z(t):
        return fixed_point(lambda z, t: z.cos() + t, number(0.5), t, solver=solver, tol=1e-14)

    found = [float(f(number(0.0))) for f in (z, grad(z), grad(grad(z)))]
    assert found == pytest.approx([0.7390851332151607, 0.5975100456753034, -0.15766311410377146], rel=1e-13)


@pytest.mark.parametrize("solver", SOLVERS)
def test_affine_contraction_has_derivative_two(solver):
    assert float(grad(lambda t: fixed_point(lambda x, t: 0.5 * x + t, number(0.0), t, solver=solver))(number(3.0))) == pytest.approx(2.0, rel=1e-12)


def test_cubic_has_its_known_roots_and_derivatives():
    def x(f):
        return root(lambda x: f * x**3 - x - 2, number(1.5))

    scales = torch.tensor([1.0, 2.0], **KIND)
    assert vmap(x)(scales).tolist() == pytest.approx([1.5213797068045676, 1.1653730430624147], rel=1e-13)
    assert vmap(grad(x))(scales).tolist() == pytest.approx([-0.5924469933174596, -0.22139916266115015], rel=1e-13)


@pytest.mark.parametrize("direction", [grad, jacfwd])
def test_jacobian_free_is_exact_where_the_jacobian_is_zero(direction):
    babylonian = direction(lambda a: fixed_point(lambda z, a: (z + a / z) / 2, number(1.0), a, adjoint="jfb"))
    assert float(babylonian(number(2.0))) == pytest.approx(0.35355339059327373, rel=1e-12)


@pytest.mark.parametrize("adjoint", ["auto", "lu", "gmres", "bicgstab", "normal-cg"])
def test_affine_map_of_200_gives_both_gradients(adjoint):
    matrix, shift, bar = drawn(200, 200) * (0.5 / 200**0.5), drawn(200, seed=1), drawn(200, seed=2)
    matrix.requires_grad_(), shift.requires_grad_()
    z = fixed_point(lambda z: matrix @ z + shift, torch.zeros(200, **KIND), adjoint=adjoint, tol=1e-12)
    found = torch.autograd.grad(z @ bar, (matrix, shift))
    inverse = torch.linalg.inv(torch.eye(200, **KIND) - matrix.detach())
    u, exact = inverse.T @ bar, inverse @ shift.detach()
    assert apart(found[1], u) <= 1e-10
    assert apart(found[0], torch.outer(u, exact)) <= 1e-10


# Never silently wrong


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("adjoint", ["auto", "cg", "gmres", "bicgstab", "normal-cg"])
@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6])
def test_ill_conditioned_systems_are_right_or_say_so(kappa, adjoint, kind):
    basis = torch.linalg.qr(drawn(60, 60))[0]
    matrix = basis @ torch.diag(torch.logspace(0, -math.log10(kappa), 60, **KIND)) @ basis.T
    shift, bar, tol = drawn(60, seed=1).to(kind).requires_grad_(), drawn(60, seed=2), {torch.float32: 1e-6, torch.float64: 1e-10}[kind]
    exact, narrow = torch.linalg.solve(matrix, bar), ((matrix + matrix.T) / 2).to(kind)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        x, info = root(lambda x: narrow @ x - shift, torch.zeros(60, dtype=kind), adjoint=adjoint, info=True)
        (found,) = torch.autograd.grad(x @ bar.to(kind), shift)
    told = any(issubclass(warning.category, NotConvergedWarning) and "adjoint" in str(warning.message) for warning in said)
    assert told == (not bool(info.adjoint.converged.all()))
    assert told or float((found.double() - exact).norm() / exact.norm()) <= min(10 * tol * kappa, 0.1)


def test_strict_raises_where_the_solver_did_not_converge():
    with pytest.raises(NotConvergedError, match="Iteration did not converge for 1 of 1"):
        fixed_point(lambda x: 2 * x + 1, torch.zeros(1, **KIND), solver="iteration", max_steps=20, strict=True)


def test_strict_raises_in_the_backward_pass_where_the_adjoint_did_not_converge():
    b = drawn(30).requires_grad_()
    matrix = drawn(30, 30, seed=1)
    x, info = root(lambda x: matrix @ x - b, torch.zeros(30, **KIND), adjoint="gmres", adjoint_steps=3, strict=True, info=True)
    with pytest.raises(NotConvergedError, match="condition estimate"):
        x.sum().backward()
    assert float(info.adjoint.residual) > 1e-3


def test_info_holds_both_solves():
    t = number(0.3).requires_grad_()
    x, info = fixed_point(lambda x: torch.cos(x) + t, number(0.0), solver="iteration", info=True)
    assert info.adjoint is None
    assert bool(info.converged)
    assert int(info.iterations) > 10
    assert float(info.residual) < 1e-9
    x.backward()
    assert info.adjoint.solver == "lu"
    assert bool(info.adjoint.converged)
    assert float(info.adjoint.residual) < 1e-14


def test_singular_system_is_named_with_its_condition():
    matrix = torch.ones(2, 2, **KIND)
    with pytest.raises(SingularError, match=r"singular .* condition estimate"):
        root(lambda x: matrix @ x - 1, torch.zeros(2, **KIND))


def test_nested_forward_mode_raises():
    for nested in (jacfwd(jacfwd(ridge)), jacfwd(jacrev(jacfwd(ridge)))):
        with pytest.raises(CapabilityError, match="forward mode is nested 2 deep"):
            nested(number(5.0))


# What the function may be


def unrolled(linear, shift, z):
    for _ in range(150):
        z = torch.tanh(linear(z) + shift)
    return z


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("adjoint", ["auto", "gmres", "bicgstab", "normal-cg", "unroll", "checkpoint", "truncated(60)", "neumann(60)", "phantom(80,0.7)"])
def test_module_weights_and_closed_over_activations_get_gradients(adjoint, batch_dims):
    linear = torch.nn.Linear(4, 4, **KIND)
    linear.weight.data, linear.bias.data = drawn(4, 4) * 0.2, drawn(4, seed=1)
    inputs, start = drawn(3, 4, seed=2).requires_grad_(), torch.zeros(3, 4, **KIND)
    wanted = torch.autograd.grad(unrolled(linear, 2 * inputs, start).square().sum(), (*linear.parameters(), inputs))
    shift = 2 * inputs  # closed over, and no leaf
    z = fixed_point(lambda z: torch.tanh(linear(z) + shift), start, adjoint=adjoint, batch_dims=batch_dims, solver="iteration", tol=1e-13)
    for found, exact in zip(torch.autograd.grad(z.square().sum(), (*linear.parameters(), inputs)), wanted, strict=True):
        assert apart(found, exact) <= 1e-9


@pytest.mark.parametrize("transform", [grad, jacfwd, hessian, lambda f: vmap(grad(f)), lambda f: vmap(hessian(f))])
def test_closed_over_tensors_are_seen_by_every_transform(transform):
    shift, start = drawn(2, 3, seed=1), torch.zeros(2, 3, **KIND)
    weights = drawn(2, 3, 3, seed=2) * 0.2

    def energy(w, solve):
        return solve(w).square().sum()

    def steps(w):
        z = start
        for _ in range(100):
            z = torch.tanh(z @ w + shift)
        return z

    def implicit(w):
        return fixed_point(lambda z: torch.tanh(z @ w + shift), start, tol=1e-14)

    argument = weights if "vmap" in transform.__code__.co_names else weights[0]
    assert apart(transform(lambda w: energy(w, implicit))(argument), transform(lambda w: energy(w, steps))(argument)) <= 1e-10


def test_closed_over_tangents_are_seen_where_the_function_is_itself_a_gradient():
    w, tangent = drawn(3), drawn(3, seed=1)

    def minimum(w):  # of ½x² + ½(w·x)² − Σx + ¼Σx⁴: x + w (w·x) − 1 + x³ = 0
        return root(torch.func.grad(lambda x: (x * x / 2 - x + x**4 / 4).sum() + (w @ x) ** 2 / 2), torch.zeros(3, **KIND))

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(minimum(forward_ad.make_dual(w, tangent))).tangent
    x = minimum(w)
    matrix = torch.diag(1 + 3 * x**2) + torch.outer(w, w)
    assert apart(found, -torch.linalg.solve(matrix, tangent * (w @ x) + w * (tangent @ x))) <= 1e-12
    assert apart(jacrev(minimum)(w), jacfwd(minimum)(w)) <= 1e-12


def test_examples_that_mix_in_spite_of_batch_dims_are_right_or_said_so():
    rates = torch.tensor([0.1, 0.4, 0.5], **KIND).requires_grad_()

    def mixing(z):
        return torch.tanh(rates[:, None] * z + 0.4 * z.mean(0) + 1)

    with pytest.warns(NotConvergedWarning, match="adjoint"):
        fixed_point(mixing, torch.zeros(3, 1, **KIND), batch_dims=1, solver="iteration").sum().backward()


def test_a_tensor_that_cannot_be_seen_is_an_error():
    w = number(2.0).requires_grad_()

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            return x - w

        @staticmethod
        def backward(ctx, bar):
            return bar, -bar

    scripted = torch.jit.trace(torch.nn.Linear(1, 1, **KIND), torch.zeros(1, **KIND))
    for function in (lambda x: Hidden.apply(x, w), lambda x: 2 * Hidden.apply(x, w), lambda x: x - scripted(x / 9)):
        with pytest.raises(CapabilityError, match="would be lost"):
            root(function, torch.zeros(1, **KIND))


def test_a_root_inside_a_root_is_differentiated_through_both():
    def inner_and_outer(t):
        return root(lambda x: x + root(lambda y: y**3 + y - t * x, number(0.5)) - 2, number(0.7))

    x, t = inner_and_outer(number(1.3)), number(1.3)
    y = 2 - x  # y³ + y = t x with y = 2 − x: dx/dt = −x / (3y² + 1 + t)
    exact = -x / (3 * y**2 + 1 + t)
    t.requires_grad_()
    assert float(torch.autograd.grad(inner_and_outer(t), t)[0]) == pytest.approx(float(exact), rel=1e-12)
    assert float(grad(inner_and_outer)(number(1.3))) == pytest.approx(float(exact), rel=1e-12)


def test_pytrees_and_aux_go_through():
    slope, target = number(2.0).requires_grad_(), torch.tensor([1.0, 2.0], **KIND).requires_grad_()

    def equations(x, p):
        return {"a": x["a"] - p[0] * x["b"].sum(), "b": x["b"] - p[1]}, x["a"] * p[0]

    x, aux = root(equations, {"a": number(0.0), "b": torch.zeros(2, **KIND)}, (slope, target), has_aux=True)
    assert x["a"].item() == 6
    assert aux.item() == 12
    aux.backward()  # aux = slope² Σ target
    assert float(slope.grad) == 12
    assert target.grad.tolist() == [4, 4]


def test_the_guess_has_gradient_zero():
    start = number(1.5).requires_grad_()
    t = number(2.0).requires_grad_()
    root(lambda x: x**3 - t, start).backward()
    assert start.grad is None or float(start.grad) == 0
    assert float(grad(lambda start: root(lambda x: x**3 - 2, start))(number(1.5))) == 0


def test_an_example_does_not_depend_on_its_batch_mates():
    rates = torch.tensor([0.1, 0.5, 0.95], **KIND)

    def solved(rates):
        rates = rates.clone().requires_grad_()
        x, info = fixed_point(lambda x: rates[:, None] * torch.cos(x), torch.zeros(len(rates), 1, **KIND), batch_dims=1, solver="iteration", info=True)
        return x.detach()[:, 0], torch.autograd.grad(x.sum(), rates)[0], info.iterations

    together = solved(rates)
    assert len(set(together[2].tolist())) == 3
    for index in range(3):
        for mine, alone in zip(together, solved(rates[index, None]), strict=True):
            assert float(mine[index]) == pytest.approx(float(alone[0]), rel=1e-14)


def test_saved_bytes_do_not_grow_with_the_steps():
    matrix = (drawn(8, 8) * 0.1).requires_grad_()

    def saved(steps):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor.nbytes) or tensor, lambda tensor: tensor), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            fixed_point(lambda z: torch.tanh(z @ matrix + 1), torch.zeros(4, 8, **KIND), solver="iteration", max_steps=steps, tol=1e-300)
        return sum(held)

    assert saved(10) == saved(1000) > 0


def test_works_inside_activation_checkpointing():
    matrix, shift = (drawn(3, 3) * 0.2).requires_grad_(), drawn(2, 3, seed=1).requires_grad_()

    def layer(shift):
        return fixed_point(lambda z: torch.tanh(z @ matrix + shift), torch.zeros(2, 3, **KIND)).sum()

    plain = torch.autograd.grad(layer(shift), (matrix, shift))
    again = torch.autograd.grad(checkpoint(layer, shift, use_reentrant=False), (matrix, shift))
    assert all(torch.equal(left, right) for left, right in zip(plain, again, strict=True))


# Approximate adjoints


def test_neumann_error_is_bounded_by_the_next_power_of_the_jacobian():
    matrix, shift, bar = torch.linalg.qr(drawn(20, 20))[0] * 0.7, drawn(20, seed=1), drawn(20, seed=2)
    exact = torch.linalg.solve(torch.eye(20, **KIND) - matrix.T, bar)

    def error(adjoint):
        found = grad(lambda shift: fixed_point(lambda z: matrix @ z + shift, torch.zeros(20, **KIND), solver="newton", adjoint=adjoint) @ bar)(shift)
        return float((found - exact).norm() / bar.norm())

    for k in (0, 3, 10):
        assert error(f"neumann({k})") <= 0.7 ** (k + 1) / 0.3 * (1 + 1e-9)
    assert error("jfb") == pytest.approx(error("neumann(0)"), rel=1e-12)
    assert error("phantom(1,1.0)") == pytest.approx(error("jfb"), rel=1e-12)
    errors = [error(f"phantom({k},0.5)") for k in (1, 5, 20, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


# Solvers of the user's own


@pytest.mark.parametrize("settings", [Anderson(memory=3), Iteration(damping=0.5)], ids=str)
def test_a_solver_with_settings_of_its_own_is_taken(settings):
    assert float(fixed_point(torch.cos, number(0.5), solver=settings, tol=1e-13)) == pytest.approx(0.7390851332151607, rel=1e-12)


def halving(t):
    def bisect(function, x0, *params):
        low, high = x0 - 4, x0 + 4
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if float(function(middle, *params)) < 0 else (low, middle)
        return (low + high) / 2

    return root(lambda x, t: x**3 + x - t, number(0.3), t, solver=bisect)


@pytest.mark.parametrize("transform", [lambda f: vmap(grad(f)), lambda f: vmap(jacfwd(f))])
def test_a_solver_that_branches_on_values_is_differentiated_and_mapped(transform):
    t = torch.tensor([1.0, 2.0], **KIND)
    assert apart(transform(halving)(t), 1 / (3 * vmap(halving)(t) ** 2 + 1)) <= 1e-10


def test_decorators_differentiate_the_decorated_solver():
    @custom_root(lambda x, t: x * x - t)
    def square_root(x0, t):
        return t.sqrt()

    @custom_fixed_point(lambda x, t: (x + t / x) / 2)
    def babylonian(x0, t):
        return t.sqrt()

    for solver in (square_root, babylonian):
        assert float(grad(lambda t: solver(number(1.0), t))(number(2.0))) == pytest.approx(0.35355339059327373, rel=1e-12)
        assert solver.__name__ in ("square_root", "babylonian")


# Bad input

ZEROS = torch.zeros(2, **KIND)
MISTAKES = {
    "fewer equations": (ShapeError, r"one equation for each unknown", lambda: root(lambda x: x[:1], ZEROS)),
    "another structure": (ShapeError, r"it must return what the unknown is", lambda: root(lambda x: {"a": x}, ZEROS)),
    "integer unknown": (ShapeError, r"torch.int64; every leaf must be", lambda: root(lambda x: x, torch.zeros(2, dtype=torch.int64))),
    "number as unknown": (ShapeError, r"is float; every leaf must be", lambda: root(lambda x: x, 0.5)),
    "two dtypes": (ShapeError, r"use one dtype", lambda: root(lambda x: x, (ZEROS, torch.zeros(1)))),
    "no batch axis": (ShapeError, r"share that many first axes", lambda: root(lambda x: x, (ZEROS, number(0.0)), batch_dims=1)),
    "unknown adjoint": (SettingError, r"Did you mean 'neumann\(k\)'", lambda: root(lambda x: x, ZEROS, adjoint="neuman(3)")),
    "phantom without tau": (SettingError, r"must read phantom\(k,tau\)", lambda: fixed_point(lambda x: x, ZEROS, adjoint="phantom(3)")),
    "series for a root": (SettingError, r"a series in df/dx", lambda: root(lambda x: x, ZEROS, adjoint="jfb")),
    "unknown solver": (SettingError, r"Did you mean 'newton'", lambda: root(lambda x: x, ZEROS, solver="newtn")),
    "negative tolerance": (SettingError, r"tol=-1", lambda: root(lambda x: x, ZEROS, tol=-1)),
    "no aux": (ShapeError, r"must return \(value, aux\)", lambda: root(lambda x: x, ZEROS, has_aux=True)),
    "unroll of Broyden": (SettingError, r"only 'iteration' and 'newton'", lambda: root(lambda x: x - 1, ZEROS, solver="broyden", adjoint="unroll")),
    "solver of another shape": (ShapeError, r"the solver returned", lambda: root(lambda x: x, ZEROS, solver=lambda function, x0: x0[:1])),
}


@pytest.mark.parametrize(("error", "message", "call"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_the_module_is_found_on_the_package():
    assert altgrad.implicit.root is root
