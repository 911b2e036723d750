"""altgrad.implicit.sinkhorn against unrolled rounds and closed forms; the re-basin problem."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from altgrad import registry
from altgrad.errors import DataError, NumericsError, SettingError, ShapeError
from altgrad.implicit import sinkhorn
from altgrad.problems.rebasin import Rebasin, between, nearest_permutation, permuted, run
from altgrad.rng import Key
from altgrad.world import World

KIND = {"dtype": torch.float64}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **KIND)


def unrolled(cost, a, b, strength, rounds=500):
    """The plan after so many rounds of scaling, traced."""
    f = torch.zeros_like(a)
    for _ in range(rounds):
        g = b.log() - torch.logsumexp(f.unsqueeze(-1) - cost / strength, -2)
        f = a.log() - torch.logsumexp(g.unsqueeze(-2) - cost / strength, -1)
    return torch.exp(f.unsqueeze(-1) + g.unsqueeze(-2) - cost / strength)


def problem(*lead, m=7, n=5):
    return [drawn(*lead, m, n, seed=1), drawn(*lead, m, seed=2).softmax(-1), drawn(*lead, n, seed=3).softmax(-1)]


def test_the_plan_has_its_marginals():
    cost, a, b = problem(3)
    plan = sinkhorn(cost, a, b, regularisation=0.2)
    assert torch.allclose(plan.sum(-1), a, atol=1e-9)
    assert torch.allclose(plan.sum(-2), b, atol=1e-14)


@pytest.mark.parametrize("strength", [1.0, 0.2])
def test_gradients_of_cost_and_marginals_are_those_of_unrolled_rounds(strength):
    weight, found = drawn(3, 7, 5, seed=4), []
    for plan in (lambda *args: sinkhorn(*args, regularisation=strength, tol=1e-14), lambda *args: unrolled(*args, strength)):
        leaves = [value.requires_grad_() for value in (drawn(3, 7, 5, seed=1), drawn(3, 7, seed=2), drawn(3, 5, seed=3))]
        (plan(leaves[0], leaves[1].softmax(-1), leaves[2].softmax(-1)) * weight).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for own, other in zip(*found, strict=True):
        assert float((own - other).abs().max() / other.abs().max()) <= 1e-12


def test_gradcheck_of_cost_and_marginals_along_changes_that_keep_their_sums():
    leaves = [value.requires_grad_() for value in (drawn(4, 3, seed=1), drawn(4, seed=2), drawn(3, seed=3))]
    assert torch.autograd.gradcheck(lambda c, a, b: sinkhorn(c, a.softmax(-1), b.softmax(-1), regularisation=0.5, tol=1e-14), leaves)


def test_the_gradient_that_comes_in_is_left_as_it_was():
    cost = drawn(6, 6).requires_grad_()
    bar = drawn(6, 6, seed=5)
    before = bar.clone()
    sinkhorn(cost, regularisation=0.5).backward(bar)
    assert torch.equal(bar, before)


def test_two_by_two_has_its_closed_form():
    # a = b = (1, 1): P = [[p, 1 - p], [1 - p, p]] with p = sigmoid(d / 2λ), d = c01 + c10 - c00 - c11
    cost = drawn(2, 2, seed=6)
    excess = cost[0, 1] + cost[1, 0] - cost[0, 0] - cost[1, 1]
    p = torch.sigmoid(excess / (2 * 0.3))
    plan = sinkhorn(cost, regularisation=0.3, tol=1e-14)
    assert torch.allclose(plan, torch.stack([torch.stack([p, 1 - p]), torch.stack([1 - p, p])]), atol=1e-12)
    slope = grad(lambda c: sinkhorn(c, regularisation=0.3, tol=1e-14)[0, 0])(cost)
    signs = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], **KIND)
    assert torch.allclose(slope, signs * p * (1 - p) / (2 * 0.3), atol=1e-12)


def test_forward_reverse_second_order_and_vmap_agree():
    cost = drawn(3, 3, seed=7)
    plan = lambda c: sinkhorn(c, regularisation=0.5, tol=1e-14)  # noqa: E731
    assert torch.allclose(jacfwd(plan)(cost), jacrev(plan)(cost), atol=1e-12)
    value = lambda c: (plan(c) ** 2).sum()  # noqa: E731
    assert torch.allclose(
        hessian(value)(cost), jacrev(jacrev(lambda c: (unrolled(c, torch.ones(3, **KIND), torch.ones(3, **KIND), 0.5) ** 2).sum()))(cost), atol=1e-10
    )
    several = drawn(4, 3, 3, seed=8)
    assert torch.allclose(vmap(grad(value))(several), torch.stack([grad(value)(one) for one in several]), atol=1e-12)


def test_an_example_does_not_feel_its_batch_mates():
    cost, a, b = problem(3)
    alone = sinkhorn(cost[1], a[1], b[1], regularisation=0.2, tol=1e-13)
    assert torch.allclose(sinkhorn(cost, a, b, regularisation=0.2, tol=1e-13)[1], alone, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda c, a, b: (c, a, 2 * b), DataError, "do not sum alike"),
        (lambda c, a, b: (c, a, b - b[0] * torch.eye(5, **KIND)[0]), DataError, "b holds a number that is not above 0"),
        (lambda c, a, b: (c, -a, -b), DataError, "a holds a number that is not above 0"),
        (lambda c, a, b: (c / 0, a, b), NumericsError, "cost holds NaN or infinity"),
        (lambda c, a, b: (c, a * torch.nan, b), NumericsError, "a holds NaN or infinity"),
        (lambda c, a, b: (c, b, a), ShapeError, r"cost is \(7, 5\)"),
    ],
)
def test_what_has_no_plan_is_refused(change, error, match):
    with pytest.raises(error, match=match):
        sinkhorn(*change(*problem()), regularisation=0.2)


def test_regularisation_must_be_positive():
    with pytest.raises(SettingError, match="regularisation=0 is not allowed"):
        sinkhorn(drawn(2, 2), regularisation=0)


# -- re-basin --------------------------------------------------------------------------------------------------------------------


def test_the_nearest_permutation_of_a_nearly_hard_plan_is_the_assignment():
    hidden = torch.eye(12, **KIND)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    plan = sinkhorn(-(hidden + 0.3 * drawn(12, 12)), regularisation=0.1)
    _, columns = linear_sum_assignment(plan.numpy(), maximize=True)
    found = nearest_permutation(plan)
    assert torch.equal(found.argmax(1), torch.from_numpy(columns))
    assert torch.equal(found.sum(0), torch.ones(12, **KIND))


@pytest.fixture(scope="module")
def rebasin():
    return Rebasin(hidden="16-16", epochs=4).build(Key(0))


def test_permuting_hidden_units_leaves_the_network_as_it_was(rebasin):
    plans = [torch.eye(16)[torch.randperm(16, generator=torch.Generator().manual_seed(seed))] for seed in range(2)]
    x = rebasin.dataset.test_inputs[:9]
    assert torch.allclose(run(permuted(rebasin.second, plans), x), run(rebasin.second, x), atol=1e-5)


def test_a_network_that_was_only_permuted_is_found_again(rebasin):
    plans = [torch.eye(16)[torch.randperm(16, generator=torch.Generator().manual_seed(seed))] for seed in range(2)]
    problem = Rebasin(hidden="16-16", epochs=4, objective="weights").build(Key(0))
    problem.second = permuted(problem.first, plans)
    engine, params = registry.engine("implicit"), problem.params()
    optimizer = torch.optim.Adam(params.values(), lr=0.1)
    for step in range(60):
        for name, value in engine.estimate(problem, params, {}, problem.batch(step, World()), Key(0, step), World()).grads.items():
            params[name].grad = value
        optimizer.step()
    found = [nearest_permutation(plan) for plan in problem.plans(params)]
    assert all(torch.equal(own, plan.T) for own, plan in zip(found, plans, strict=True))
    assert problem.figures({name: value.detach() for name, value in params.items()})["barrier"] <= 1e-5


def test_the_middle_of_the_path_is_the_mean_of_the_weights(rebasin):
    middle = between(rebasin.first, rebasin.second, 0.5)
    assert torch.allclose(middle[0][0], (rebasin.first[0][0] + rebasin.second[0][0]) / 2)


def test_the_gradient_of_the_matching_is_that_of_unrolled_rounds(rebasin):
    batch = rebasin.batch(0, World())
    params = {name: value.detach().double().requires_grad_() for name, value in rebasin.params().items()}
    ones = torch.ones(16, **KIND)
    plans = [unrolled(-value, ones, ones, rebasin.settings.regularisation) for value in params.values()]
    first, second = ([(w.double(), b.double()) for w, b in part] for part in (rebasin.first, rebasin.second))
    moved = permuted(second, plans)
    loss = torch.nn.functional.cross_entropy(run(between(first, moved, 0.5), batch.inputs.double()), batch.targets) + rebasin.distance(moved)
    wanted = torch.autograd.grad(loss, list(params.values()))
    found = registry.engine("implicit").estimate(rebasin, rebasin.params(), {}, batch, Key(0), World()).grads
    for own, exact in zip(found.values(), wanted, strict=True):
        assert float((own - exact).norm() / exact.norm()) <= 1e-4


@pytest.mark.parametrize(
    ("setting", "match"), [({"objective": "middle"}, "unknown objective"), ({"hidden": "a"}, "hidden"), ({"regularisation": 0}, "above 0")]
)
def test_rebasin_refuses_settings(setting, match):
    with pytest.raises(SettingError, match=match):
        Rebasin(**setting)
