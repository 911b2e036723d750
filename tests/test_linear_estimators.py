"""altgrad.implicit's ready problems beside scikit-learn in value and finite differences in derivative."""

import warnings

import pytest
import torch
from sklearn import linear_model
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC
from torch.func import hessian, jacfwd, jacrev, vmap

from altgrad.errors import NotConvergedError, SettingError, ShapeError, SingularError
from altgrad.implicit import elastic_net, lasso, logistic_regression, ridge, svm

KIND = {"dtype": torch.float64}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **KIND)


def number(value):
    return torch.tensor(value, **KIND)


def apart(found, wanted):
    return float((found - torch.as_tensor(wanted)).detach().abs().max() / torch.as_tensor(wanted).abs().max())


X = drawn(40, 8)
TRUE = drawn(8, seed=1) * torch.tensor([1.0, 1, 1, 0, 0, 0, 1, 1], **KIND)
Y = X @ TRUE + 0.3 * drawn(40, seed=2)
BINARY = (Y > 0).to(torch.float64)
THREE = torch.bucketize(Y, torch.tensor([-1.0, 1.0], **KIND))

# name: (strength -> weights, scikit-learn's estimator at that strength, its targets, relative difference allowed: its own tolerance)
PROBLEMS = {
    "ridge": (lambda s: ridge(X, Y, s), lambda s: linear_model.Ridge(alpha=s, fit_intercept=False, solver="cholesky"), Y, 1e-12),
    "lasso": (lambda s: lasso(X, Y, s), lambda s: linear_model.Lasso(alpha=s, fit_intercept=False, tol=1e-14, max_iter=100_000), Y, 1e-10),
    "elastic net": (
        lambda s: elastic_net(X, Y, 0.3 * s, 0.7 * s),
        lambda s: linear_model.ElasticNet(alpha=s, l1_ratio=0.3, fit_intercept=False, tol=1e-14, max_iter=100_000),
        Y,
        1e-10,
    ),
    "logistic": (
        lambda s: logistic_regression(X, BINARY, s),
        lambda s: linear_model.LogisticRegression(C=1 / s, fit_intercept=False, tol=1e-12, solver="newton-cholesky"),
        BINARY,
        1e-10,
    ),
    "softmax": (
        lambda s: logistic_regression(X, THREE, s, classes=3),
        lambda s: linear_model.LogisticRegression(C=1 / s, fit_intercept=False, tol=1e-10, max_iter=10_000),
        THREE,
        1e-6,
    ),
    "svm": (
        lambda s: svm(X, 2 * BINARY - 1, s),
        lambda s: LinearSVC(C=s, loss="squared_hinge", dual=False, fit_intercept=False, tol=1e-12, max_iter=100_000),
        BINARY,
        1e-7,
    ),
    "hinge svm": (
        lambda s: svm(X, 2 * BINARY - 1, s, loss="hinge"),
        lambda s: LinearSVC(C=s, loss="hinge", fit_intercept=False, tol=1e-12, max_iter=200_000),
        BINARY,
        1e-6,
    ),
}


@pytest.mark.parametrize(("ours", "theirs", "targets", "allowed"), PROBLEMS.values(), ids=PROBLEMS)
def test_weights_are_scikit_learns(ours, theirs, targets, allowed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # liblinear, at a tolerance below its reach
        wanted = torch.tensor(theirs(0.4).fit(X.numpy(), targets.numpy()).coef_, **KIND)
    assert apart(ours(number(0.4)), wanted.T if len(wanted.shape) == 2 and len(wanted) > 1 else wanted.squeeze()) <= allowed


@pytest.mark.parametrize(("ours", "theirs", "targets", "allowed"), PROBLEMS.values(), ids=PROBLEMS)
def test_hypergradients_are_those_of_finite_differences_in_every_mode(ours, theirs, targets, allowed):
    s, step = number(0.4), 1e-5
    difference = (ours(s + step) - ours(s - step)) / (2 * step)
    curve = (jacfwd(ours)(s + step) - jacfwd(ours)(s - step)) / (2 * step)
    for direction in (jacrev, jacfwd):
        assert apart(direction(ours)(s), difference) <= 1e-7
    assert float((hessian(ours)(s) - curve).abs().max()) <= 1e-6 * float(1 + curve.abs().max())
    assert apart(vmap(jacrev(ours))(s.reshape(1))[0], difference) <= 1e-7


FEW = {"features": drawn(9, 3, seed=3), "targets": drawn(9, seed=4)}
SIGNS = FEW["targets"].sign()
DATA = {
    "ridge": (lambda x, y, s: ridge(x, y, s), FEW["targets"]),
    "lasso": (lambda x, y, s: lasso(x, y, s / 10), FEW["targets"]),
    "elastic net": (lambda x, y, s: elastic_net(x, y, s / 10, s / 5), FEW["targets"]),
    "logistic": (lambda x, y, s: logistic_regression(x, y, s), torch.sigmoid(FEW["targets"])),
    "svm": (lambda x, y, s: svm(x, SIGNS, s[0] + 0 * y), FEW["targets"]),
    "hinge svm": (lambda x, y, s: svm(x, SIGNS, s[0] + 0 * y, loss="hinge"), FEW["targets"]),
}


@pytest.mark.parametrize(("ours", "targets"), DATA.values(), ids=DATA)
def test_derivatives_in_data_and_in_a_strength_for_each_weight_are_right(ours, targets):
    arguments = [part.clone().requires_grad_() for part in (FEW["features"], targets, torch.tensor([0.4, 0.5, 0.7], **KIND))]
    for index in range(3):  # one at a time: fast mode looks along one random direction of each
        one = [part if place == index else part.detach() for place, part in enumerate(arguments)]
        assert torch.autograd.gradcheck(ours, one, check_forward_ad=True, fast_mode=True)


def test_second_derivatives_in_data_are_right():
    arguments = [part.clone().requires_grad_() for part in (FEW["features"], FEW["targets"], torch.tensor([0.4, 0.5, 0.7], **KIND))]
    for name in ("ridge", "lasso"):
        assert torch.autograd.gradgradcheck(DATA[name][0], arguments, fast_mode=True)


def test_the_lassos_jacobian_lives_on_its_support():
    w = lasso(X, Y, 0.2)
    on = w != 0
    assert 0 < int(on.sum()) < 8
    found = jacrev(lambda s: lasso(X, Y, s))(number(0.2))
    gram = X[:, on].T @ X[:, on] / len(X)
    assert apart(found[on], -torch.linalg.solve(gram, w[on].sign())) <= 1e-12
    assert bool((found[~on] == 0).all())


def test_a_strength_beyond_the_largest_gives_zero_and_derivative_zero():
    large = float((X.T @ Y).abs().max() / len(X)) * 1.1
    assert bool((lasso(X, Y, large) == 0).all())
    assert bool((jacrev(lambda s: lasso(X, Y, s))(number(large)) == 0).all())


@pytest.mark.parametrize("share", [0.5, 0.05, 0.005])
def test_lasso_with_more_features_than_examples_meets_its_conditions(share):
    x, y = drawn(30, 90, seed=5), drawn(30, seed=6)
    strength = share * float((x.T @ y).abs().max() / 30)
    w = lasso(x, y, strength, strict=True)
    slope = x.T @ (x @ w - y) / 30
    assert float((slope[w != 0] + strength * w[w != 0].sign()).abs().max()) <= 1e-7 * strength / share
    assert float(slope.abs().max()) <= strength * (1 + 1e-7 / share)
    assert int((w != 0).sum()) <= 30


def test_weights_of_examples_stand_for_repetition():
    twice = torch.cat([torch.arange(40), torch.tensor([3, 3])])
    weights = torch.ones(40, **KIND)
    weights[3] = 3
    assert apart(logistic_regression(X, BINARY, 0.4, weights=weights), logistic_regression(X[twice], BINARY[twice], 0.4)) <= 1e-9


def test_vmap_solves_a_batch_of_problems():
    features, targets = drawn(3, 20, 4), drawn(3, 20, seed=1)
    for problem in (ridge, lasso, logistic_regression):
        together = vmap(problem, (0, 0, None))(features, targets, number(0.1).expand(4))
        assert apart(together, torch.stack([problem(x, y, number(0.1)) for x, y in zip(features, targets, strict=True)])) <= 1e-7


MISTAKES = {
    "targets too short": (ShapeError, r"must be \[n, p\] and \[n\]", lambda: ridge(X, Y[:3], 1.0)),
    "a batch": (ShapeError, "torch.func.vmap", lambda: lasso(X[None], Y[None], 1.0)),
    "integers": (ShapeError, "features.double", lambda: ridge(X.long(), Y, 1.0)),
    "negative strength": (SettingError, "strength=-1", lambda: ridge(X, Y, -1.0)),
    "strengths of other features": (ShapeError, r"must be a scalar or \[8\]", lambda: lasso(X, Y, torch.ones(3, **KIND))),
    "one class": (SettingError, "classes=1", lambda: logistic_regression(X, THREE, 1.0, classes=1)),
    "probabilities as classes": (ShapeError, "whole numbers", lambda: logistic_regression(X, BINARY, 1.0, classes=2)),
    "weights": (ShapeError, r"weights are \(3,\)", lambda: logistic_regression(X, BINARY, 1.0, weights=torch.ones(3, **KIND))),
    "unknown loss": (SettingError, "Did you mean 'squared-hinge'", lambda: svm(X, BINARY, 1.0, loss="squared")),
    "no cost": (SettingError, "cost=0", lambda: svm(X, BINARY, 0.0)),
    "dependent columns": (SingularError, "give a strength above 0", lambda: ridge(torch.cat([X, X], 1), Y, 0.0)),
    "dependent columns under vmap": (SingularError, "condition", lambda: vmap(ridge, (0, None, None))(torch.cat([X, X], 1)[None], Y, 0.0)),
    "too few steps": (NotConvergedError, "did not converge", lambda: logistic_regression(X, BINARY, 1e-3, max_steps=1, strict=True)),
}


@pytest.mark.parametrize(("error", "message", "call"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
