"""Hyper-gradients: against the closed form of ridge regression and finite differences, with every adjoint, inner optimizer and engine."""

import warnings

import pytest
import torch

from altgrad import registry, trainer
from altgrad.alignment import products
from altgrad.errors import NotConvergedError, NotConvergedWarning, SettingError, ShapeError, UsageError
from altgrad.hyper import Inner, Task, minimise
from altgrad.hyper.corruption import corrupted_labels
from altgrad.hyper.logistic import Cleaning, Decay
from altgrad.hyper.scores import roc_auc
from altgrad.hyper.task import Parts
from altgrad.problems.hyper import Hyper, HyperProblem
from altgrad.rng import Key
from altgrad.training import TrainSettings, build, resume
from altgrad.world import World

KIND = {"dtype": torch.float64}
draws = torch.Generator().manual_seed(0)
X, V = torch.randn(30, 5, generator=draws, **KIND), torch.randn(20, 5, generator=draws, **KIND)
TRUTH = torch.randn(5, generator=draws, **KIND)
Y, U = X @ TRUTH + torch.randn(30, generator=draws, **KIND), V @ TRUTH


class Ridge(Task):
    """g = ½ mean (X w − y)² + ½ Σ e^θ w²; f = ½ (v w − u)²."""

    parts = Parts(V, U, V, U)

    def params(self):
        return {"theta": torch.tensor([-1.0, -2.0, 0.0, 0.5, -3.0], **KIND)}

    def weights(self):
        return {"w": torch.zeros(5, **KIND)}

    def inner(self, params, weights):
        return 0.5 * (X @ weights["w"] - Y).square().mean() + 0.5 * (params["theta"].exp() * weights["w"].square()).sum()

    def curvature(self, params):
        return torch.linalg.eigvalsh(X.T @ X / 30)[-1] + params["theta"].exp().amax()

    def predict(self, weights, inputs):
        return inputs @ weights["w"]

    def losses(self, outputs, targets):
        return 0.5 * (outputs - targets).square()


def closed_form():
    """(w*, dL/dθ, the Hessian, ∂L/∂w): dL/dθ_j = −e^θ_j w_j (H⁻¹ ∂L/∂w)_j."""
    decay = Ridge().params()["theta"].exp()
    hessian = X.T @ X / 30 + decay.diag()
    w = torch.linalg.solve(hessian, X.T @ Y / 30)
    slope = V.T @ (V @ w - U) / 20
    return w, -decay * w * torch.linalg.solve(hessian, slope), hessian, slope


PRECISE = {"optimizer": "SGD", "lr": 0.3, "settings": "momentum=0.9", "steps": 5000}  # LBFGS compares losses, and stalls at 1e-10
QUICK: dict = {"inner": {}, "tol": 1e-9}


def ridge(*, tol=1e-13, inner=PRECISE, **settings):
    return HyperProblem(Ridge(), inner=Inner(**inner, tol=tol), **settings)


def hypergradient(problem, engine="implicit", **settings):
    """The estimate on the whole validation set, at the problem's parameters."""
    settings = {"solver": "rest", "adjoint": "cg", "tol": 1e-12, **settings} if engine == "implicit" else settings
    rule = registry.engine(engine, settings)
    params = {name: value.detach() for name, value in problem.params().items()}
    return rule.estimate(problem, params, rule.init(problem, params, Key(0)), problem.batch(0, World()), Key(0), World())


def run_of(problem_settings, engine_settings, **settings):
    return build(TrainSettings(problem="hyper", problem_settings=problem_settings, engine="implicit", engine_settings=engine_settings, **settings))


def apart(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


# Ridge regression


@pytest.mark.parametrize("adjoint", ["auto", "lu", "cholesky", "cg", "gmres", "bicgstab", "normal-cg"])
def test_ridge_hypergradient_is_its_closed_form_with_every_exact_adjoint(adjoint):
    assert apart(hypergradient(ridge(), adjoint=adjoint).grads["theta"], closed_form()[1]) <= 1e-10


@pytest.mark.parametrize("solver", ["newton", "anderson", "iteration"])
def test_ridge_hypergradient_is_its_closed_form_with_the_engines_own_solvers(solver):
    found = hypergradient(ridge(begin="zeros"), solver=solver, max_steps=5000)
    assert apart(found.grads["theta"], closed_form()[1]) <= 1e-10


def test_backprop_sees_the_implicit_gradient_through_the_losses():
    assert apart(hypergradient(ridge(), "backprop").grads["theta"], closed_form()[1]) <= 1e-10


def test_losses_batch_over_hyper_parameters():
    problem, theta = ridge(), Ridge().params()["theta"]
    batch, shifted = problem.batch(0, World()), torch.stack([theta, theta + 0.5])
    found = torch.func.vmap(lambda theta: problem.loss({"theta": theta}, batch, problem.fresh_buffers()))(shifted)
    wanted = [problem.loss({"theta": one}, batch, problem.fresh_buffers()) for one in shifted]
    assert apart(found, torch.stack(wanted).detach()) <= 1e-10


def test_forward_mode_sees_the_same_derivative():
    problem, move = ridge(), torch.ones(5, **KIND)
    batch = problem.batch(0, World())
    _, slope = torch.func.jvp(lambda theta: problem.loss({"theta": theta}, batch, problem.fresh_buffers()), (Ridge().params()["theta"],), (move,))
    assert abs(float(slope - closed_form()[1] @ move)) <= 1e-10


@pytest.mark.parametrize(
    ("name", "lr", "settings", "steps"),
    [("LBFGS", None, "", 50), ("SGD", 0.3, "momentum=0.9", 2000), ("Adam", 0.01, "betas=(0.9, 0.99)", 3000), ("Rprop", 0.01, "", 1000)],
    ids=["LBFGS", "SGD", "Adam", "Rprop"],
)
def test_any_optimizer_may_solve_the_inner_problem(name, lr, settings, steps):
    found = hypergradient(ridge(inner={"optimizer": name, "lr": lr, "settings": settings, "steps": steps}, tol=1e-8), tol=1e-7)
    assert apart(found.grads["theta"], closed_form()[1]) <= 1e-6


@pytest.mark.parametrize("engine", ["es", "eggroll", "spsa"])
def test_rules_without_derivatives_evaluate_the_solved_problem(engine):
    found = hypergradient(ridge(inner={}, tol=1e-7), engine, population=4)
    w = closed_form()[0]
    assert abs(float(found.loss) - float((V @ w - U).square().mean() / 2)) <= 1e-6
    cosine, _, _ = products(found.grads, {"theta": closed_form()[1]})[""].tolist()
    assert cosine > 0.2  # four directions in five dimensions


# Approximate adjoints


def test_neumann_errors_stay_below_their_bound_and_shrink():
    _, exact, hessian, slope = closed_form()
    decay, w = Ridge().params()["theta"].exp(), closed_form()[0]
    rate = 1 / Ridge().curvature(Ridge().params())
    norm = float(torch.linalg.matrix_norm(torch.eye(5, **KIND) - rate * hessian, 2))
    errors = []
    for k in (0, 3, 10, 30):
        found = hypergradient(ridge(**QUICK), adjoint=f"neumann({k})", tol=1e-8).grads["theta"]
        errors.append(float(torch.linalg.vector_norm(found - exact)))
        bound = norm ** (k + 1) / (1 - norm) * float(rate * torch.linalg.vector_norm(slope) * (decay * w).abs().max())
        assert errors[-1] <= bound
    assert errors == sorted(errors, reverse=True)


def test_jfb_is_neumann_without_terms():
    found = [hypergradient(ridge(**QUICK), adjoint=name, tol=1e-8).grads["theta"] for name in ("jfb", "neumann(0)")]
    assert torch.equal(*found)


@pytest.mark.parametrize("adjoint", ["unroll", "checkpoint"])
def test_tracing_the_inner_steps_comes_to_the_exact_gradient_as_they_grow(adjoint):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        found = [hypergradient(ridge(begin="zeros"), solver="iteration", adjoint=adjoint, max_steps=steps).grads["theta"] for steps in (5, 20, 150)]
    errors = [apart(one, closed_form()[1]) for one in found]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] <= 1e-6


def test_truncated_steps_come_to_the_exact_gradient_as_they_grow():
    found = [hypergradient(ridge(**QUICK), solver="iteration", adjoint=f"truncated({k})", tol=1e-8).grads["theta"] for k in (1, 10, 200)]
    errors = [apart(one, closed_form()[1]) for one in found]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] <= 1e-6


def test_the_cosine_to_the_exact_hypergradient_is_reported():
    found = hypergradient(ridge(**QUICK), adjoint="neumann(2)", tol=1e-8, compare=True)
    wanted = torch.nn.functional.cosine_similarity(found.grads["theta"], closed_form()[1], dim=0)
    assert abs(float(found.metrics["cosine"] - wanted)) <= 1e-7
    assert float(wanted) < 0.99999


# The tasks


def small(kind, count=36):
    generator = torch.Generator().manual_seed(3)
    inputs, labels = torch.randn(count, 4, generator=generator, **KIND), torch.randint(3, (count,), generator=generator)
    held, targets = torch.randn(24, 4, generator=generator, **KIND), torch.randint(3, (24,), generator=generator)
    parts = Parts(held, targets, held, targets)
    if kind == "cleaning":
        return Cleaning(inputs, labels, parts, classes=3, corrupted=labels == 0, first=0.3)
    return Decay(inputs, labels, parts, classes=3, share=kind, first=0.05)


@pytest.mark.parametrize("kind", ["feature", "weight", "cleaning"])
def test_logistic_hypergradients_agree_with_finite_differences(kind):
    problem, size = HyperProblem(small(kind), inner=Inner(**PRECISE | {"lr": 1.0}, tol=1e-10)), 1e-3
    (name, theta), batch = next(iter(problem.params().items())), problem.batch(0, World())
    found = hypergradient(problem, tol=1e-9).grads[name]
    for place in range(2):
        move = torch.zeros_like(theta).flatten()
        move[place] = size
        with torch.no_grad():
            ends = [problem.loss({name: theta + sign * move.reshape(theta.shape)}, batch, problem.fresh_buffers()) for sign in (1, -1)]
        assert abs(float((ends[0] - ends[1]) / (2 * size) - found.flatten()[place])) <= 1e-5 * float(found.abs().max())


@pytest.mark.parametrize("kind", ["feature", "weight", "cleaning"])
def test_the_curvature_bounds_the_inner_hessian(kind):
    task = small(kind)
    weights, params = task.weights(), task.params()
    sizes = [value.numel() for value in weights.values()]

    def inner(flat):
        parts = (part.reshape(value.shape) for part, value in zip(flat.split(sizes), weights.values(), strict=True))
        return task.inner(params, dict(zip(weights, parts, strict=True)))

    for seed in range(3):
        at = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed), **KIND)
        assert float(torch.linalg.eigvalsh(torch.func.hessian(inner)(at))[-1]) <= float(task.curvature(params))


def test_exactly_the_share_asked_for_is_corrupted_and_every_corrupted_label_is_wrong():
    labels = torch.arange(100) % 10
    given, corrupted = corrupted_labels(labels, 0.5, 10, Key(1))
    assert int(corrupted.sum()) == 50
    assert torch.equal(given != labels, corrupted)
    assert set(given.tolist()) <= set(range(10))
    assert torch.equal(given, corrupted_labels(labels, 0.5, 10, Key(1))[0])
    assert not torch.equal(given, corrupted_labels(labels, 0.5, 10, Key(2))[0])


def test_auc_counts_pairs_and_ties_by_half():
    score, positive = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.9]), torch.tensor([False, True, False, False, True])
    pairs = [(1.0 if a > b else 0.5 if a == b else 0.0) for a in score[positive] for b in score[~positive]]
    assert roc_auc(score, positive) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_cleaning_finds_wrong_labels_and_beats_training_on_all_of_them():
    settings = {"task": "cleaning", "examples": 360, "inner_tol": 1e-5}
    run = run_of(settings, {"solver": "rest", "adjoint": "cg", "tol": 1e-4}, lr=1.0, steps=5)
    before = trainer.evaluate(run)
    figures = trainer.fit(run).figures
    assert figures["test_accuracy"] > before["test_accuracy"] + 0.1
    assert figures["test_recovered"] > 0.8
    assert figures["test_clean_kept"] > 0.8
    assert figures["test_auc"] > 0.85


# The inner solution


def test_an_inner_answer_that_is_not_stationary_is_reported_once():
    problem = ridge(inner={"optimizer": "SGD", "lr": 1e-3, "steps": 3})
    with pytest.warns(NotConvergedWarning, match="inner problem is not solved: residual"):
        problem.solve(problem.params(), problem.first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.solve(problem.params(), problem.first)


def test_an_inner_answer_that_is_not_stationary_is_an_error_where_strict():
    problem = ridge(inner={"optimizer": "SGD", "lr": 1e-3, "steps": 3}, strict=True)
    with pytest.raises(NotConvergedError, match="inner_steps"):
        hypergradient(problem)
    with pytest.raises(NotConvergedError, match="inner_steps"):
        hypergradient(problem, "backprop")


@pytest.mark.parametrize("engine", ["implicit", "backprop"])
def test_the_next_solve_begins_where_the_last_one_ended(engine):
    problem = ridge()
    assert problem.solve(problem.params(), problem.warm(problem.buffers())).steps > 0
    problem.load({}, hypergradient(problem, engine).buffers)
    assert problem.solve(problem.params(), problem.warm(problem.buffers())).steps == 0


def test_minimise_leaves_its_start_alone():
    start = {"w": torch.zeros(5, **KIND)}
    found = minimise(lambda weights: (weights["w"] - 1).square().sum(), start, curvature=2.0)
    assert found.converged
    assert torch.equal(start["w"], torch.zeros(5, **KIND))
    assert not found.weights["w"].requires_grad
    assert apart(found.weights["w"], torch.ones(5, **KIND)) <= 1e-6


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    settings = {"examples": 60, "inner_tol": 1e-4}, {"solver": "rest", "adjoint": "cg", "tol": 1e-3}
    whole = run_of(*settings, steps=4)
    trainer.fit(whole)
    part = run_of(*settings, steps=4)
    trainer.fit(part, run_folder=tmp_path / "run", on_step=lambda run, _: run.step == 2)
    rest = resume(tmp_path / "run")
    assert rest.step == 2
    trainer.fit(rest)
    assert torch.equal(whole.params["log_decay"], rest.params["log_decay"])


# What is refused


@pytest.mark.parametrize(
    "settings",
    [
        {"task": "weigth-decay"},
        {"corruption": 1.0},
        {"validation": 0.0},
        {"first": -1.0},
        {"ridge": 0.0},
        {"inner_steps": 0},
        {"inner_tol": 0.0},
        {"examples": 1},
        {"adjoint": "unroll"},
        {"adjoint": "neuman(3)"},
        {"precision": "float16"},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingError):
        registry.problem("hyper", settings).build(Key(0))


def test_unknown_inner_optimizers_are_refused():
    with pytest.raises(UsageError, match="LBFGS"):
        registry.problem("hyper", {"inner_optimizer": "LBFG"}).build(Key(0))


def test_a_setting_that_the_inner_optimizer_lacks_is_refused():
    with pytest.raises(SettingError, match="momentun"):
        hypergradient(ridge(inner={"optimizer": "SGD", "lr": 0.1, "settings": "momentun=0.9"}))


def test_tracing_a_solution_that_is_handed_in_is_refused():
    with pytest.raises(SettingError, match="begin=zeros"):
        run_of({"examples": 60}, {"solver": "iteration", "adjoint": "unroll"})


def test_a_training_loss_that_is_no_scalar_is_refused(monkeypatch):
    monkeypatch.setattr(Ridge, "inner", lambda self, params, weights: weights["w"])
    with pytest.raises(ShapeError, match="inner returned shape"):
        hypergradient(ridge())


def test_a_model_is_refused():
    with pytest.raises(UsageError, match="mlp"):
        Hyper().build(Key(0), model="mlp")


# Planted bugs


@pytest.mark.parametrize("bug", ["a rate whose derivative is kept, twice", "the decay without its half", "warm start as the answer"])
def test_planted_bugs_miss_the_closed_form(bug, monkeypatch):
    problem = ridge()
    if bug == "a rate whose derivative is kept, twice":
        step = HyperProblem.step
        monkeypatch.setattr(HyperProblem, "step", lambda self, params, s, x: {k: 2 * v - s[k].detach() for k, v in step(self, params, s, x).items()})
    elif bug == "the decay without its half":
        monkeypatch.setattr(Ridge, "inner", lambda self, params, w: 0.5 * (X @ w["w"] - Y).square().mean() + (params["theta"].exp() * w["w"].square()).sum())
    else:
        monkeypatch.setattr(HyperProblem, "rest", lambda self, params, x: dict(self.first))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        assert not apart(hypergradient(problem).grads["theta"], closed_form()[1]) <= 1e-6


def test_the_sign_of_the_step_would_be_seen(monkeypatch):
    step = HyperProblem.step
    monkeypatch.setattr(HyperProblem, "step", lambda self, params, s, x: {name: 2 * s[name] - value for name, value in step(self, params, s, x).items()})
    found = hypergradient(ridge(), adjoint="neumann(3)").grads["theta"]
    assert float(products({"theta": found}, {"theta": closed_form()[1]})[""][0]) < 0
