"""The engine implicit, on models with implicit layers and on problems with a fixed point."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from deep_nets import KIND, Fixed, close, drawn, estimated, fixed_batch, gradients, pair

from altgrad import models, registry
from altgrad.conformance.settling import settling
from altgrad.engine import Bias, fit_check
from altgrad.errors import CapabilityError, NotConvergedError, NotConvergedWarning, SettingError
from altgrad.learner import Learner
from altgrad.problem import Batch, Problem
from altgrad.rng import Key
from altgrad.testing import checks
from altgrad.world import World

# -- the engine ------------------------------------------------------------------------------------------------------------------


def test_implicit_and_backprop_and_forward_give_one_gradient_on_a_deep_equilibrium_model():
    deq, unrolled = pair()
    wanted = gradients(unrolled)
    close(estimated(deq).grads.values(), wanted, 1e-9)
    close(estimated(deq, "backprop").grads.values(), wanted, 1e-9)
    total = sum(value.numel() for value in deq.parameters())
    close(estimated(deq, "forward", space="weights", tangents=total, combine="orthogonal").grads.values(), wanted, 1e-7)


def test_other_engines_drive_a_deep_equilibrium_model():
    deq, _ = pair()
    for name, settings in (("eggroll", {"population": 8}), ("spsa", {"population": 4}), ("equilibrium", {}), ("direct-feedback-alignment", {})):
        problem, rule = Fixed(deq, F.cross_entropy), registry.engine(name, settings)
        params = {**problem.params(), **rule.aux(problem, Key(0))}
        found = rule.estimate(problem, params, rule.init(problem, params, Key(0)), problem.batch(0, World()), Key(0), World())
        assert all(bool(value.isfinite().all()) for value in dict(found.grads).values())


def test_what_the_layers_found_is_in_the_metrics():
    found = estimated(pair()[0], adjoint="gmres", radius=40, compare=True).metrics
    assert float(found["residual"]) <= 1e-9
    assert float(found["iterations"]) >= 3
    assert float(found["adjoint_products"]) >= 3
    assert float(found["adjoint_residual"]) <= 1e-9
    assert float(found["converged"]) == float(found["adjoint_converged"]) == 1
    assert 0 < float(found["radius"]) < 1
    assert float(found["cosine"]) == pytest.approx(1, abs=1e-9)


def test_the_engines_settings_take_the_layers_place():
    deq, _ = pair(adjoint="jfb")
    exact = estimated(deq, adjoint="lu", compare=True)
    rough = estimated(deq, compare=True)
    assert float(exact.metrics["cosine"]) == pytest.approx(1, abs=1e-12)
    assert float(rough.metrics["cosine"]) < 0.999
    assert float(rough.metrics["adjoint_residual"]) > 1e-3


def test_the_penalty_of_a_net_that_settles_is_in_the_gradient():
    problem, rule, size = settling(torch.float64), registry.engine("implicit", {"jacobian": 0.5, "tol": 1e-12}), 1e-5
    batch, params = problem.batch(0, World()), {name: value.detach() for name, value in problem.params().items()}
    along = {name: torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(0)) for name, value in params.items()}

    def at(step):
        moved = {name: value + step * along[name] for name, value in params.items()}
        found = rule.estimate(problem, moved, {}, batch, Key(0), World())
        return found, float(found.loss + 0.5 * found.metrics["jacobian"])

    slope = sum(float((at(0.0)[0].grads[name] * value).sum()) for name, value in along.items())
    assert slope == pytest.approx((at(size)[1] - at(-size)[1]) / (2 * size), rel=1e-6)
    assert float(at(0.0)[0].metrics["jacobian"]) > 1e-3


@pytest.mark.parametrize("adjoint", ["jfb", "neumann(8)", "phantom(5,0.5)", "truncated(4)", "unroll", "checkpoint"])
def test_an_approximate_adjoint_says_so_and_prints_its_cosine(adjoint):
    engine = registry.engine("implicit", {"adjoint": adjoint})
    assert engine.bias is Bias.LIMIT
    found = estimated(pair(solver="iteration")[0], adjoint=adjoint, solver="iteration", compare=True, max_steps=400)
    assert 0.5 < float(found.metrics["cosine"]) <= 1 + 1e-12


def test_more_terms_of_neumann_come_nearer():
    deq, _ = pair()
    seen = [float(estimated(deq, adjoint=f"neumann({count})", compare=True).metrics["cosine"]) for count in (0, 2, 6, 40)]
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1, abs=1e-9)


def test_strict_raises_where_a_solve_stops_early():
    with pytest.raises(NotConvergedError, match="did not converge"):
        estimated(pair()[0], strict=True, max_steps=2)


def test_a_linear_probe_of_the_engine_learns_digits():
    key, problem = (
        Key(0),
        registry.problem("digits").build(Key(0), model="deq", model_settings={"width": "16", "kind": "subhomogeneous", "activation": "power"}),
    )
    engine, params = registry.engine("implicit"), problem.params()
    optimizer = torch.optim.Adam(params.values(), lr=1e-2)
    losses = []
    for step in range(30):
        found = engine.estimate(problem, params, {}, problem.batch(step, World()), key.at(step), World())
        for name, value in found.grads.items():
            params[name].grad = value
        optimizer.step()
        losses.append(float(found.loss))
    assert losses[-1] < 0.5 * losses[0]


def test_the_learner_trains_a_model_with_the_layer():
    deq, unrolled = pair()
    learner = Learner(deq, F.cross_entropy, engine="implicit")
    learner.backward(*fixed_batch())
    close([value.grad for value in deq.parameters()], gradients(unrolled), 1e-9)
    assert torch.allclose(learner.predict(fixed_batch()[0]), unrolled(fixed_batch()[0]), atol=1e-10)


class Shared(Problem):
    """A ridge problem whose state is the inner weights, shared by the batch: L(λ) = mean ½ (x w*(λ) - y)², w* = argmin ½‖Aw - c‖² + ½ e^λ ‖w‖²."""

    batch_dims = 0

    def __init__(self):
        self.a, self.c = drawn(20, 3, seed=1), drawn(20, seed=2)
        self.strength = torch.tensor(0.5, **KIND)

    def params(self):
        return {"strength": self.strength}

    def batch(self, step, world):
        return Batch(drawn(8, 3, seed=3), drawn(8, seed=4))

    def rest(self, params, x):
        return {"w": torch.zeros(3, **KIND)}

    def step(self, params, z, x):
        w = z["w"]
        return {"w": w - 0.02 * (self.a.T @ (self.a @ w - self.c) + params["strength"].exp() * w)}

    def readout(self, params, z, x):
        return x @ z["w"] + 0.1 * params["strength"]

    def score(self, outputs, targets):
        return 0.5 * (outputs - targets).square()

    def best(self, params):
        return torch.linalg.solve(self.a.T @ self.a + params["strength"].exp() * torch.eye(3, **KIND), self.a.T @ self.c)

    def forward(self, params, inputs, buffers):
        return self.readout(params, {"w": self.best(params)}, inputs)

    def losses(self, params, batch, buffers):
        return self.score(self.forward(params, batch.inputs, buffers), batch.targets)


def test_a_state_that_the_batch_shares_has_the_closed_forms_gradient_with_the_read_outs_own_added():
    problem = Shared()
    bench = registry.engine("implicit", {"compare": True})
    found = bench.estimate(problem, problem.params(), {}, problem.batch(0, World()), Key(0), World())
    params = {"strength": problem.strength.clone().requires_grad_()}
    loss = problem.losses(params, problem.batch(0, World()), {}).mean()
    wanted = torch.autograd.grad(loss, list(params.values()))
    close(found.grads.values(), wanted, 1e-8)
    assert float(found.loss) == pytest.approx(float(loss.detach()), rel=1e-9)
    assert torch.allclose(
        bench.predict(problem, problem.params(), {}, problem.batch(0, World()).inputs), problem.forward(problem.params(), drawn(8, 3, seed=3), {})
    )


def test_rest_as_the_solution_takes_what_the_problem_found():
    class Solved(Shared):
        def rest(self, params, x):
            return {"w": self.best(params)}

    problem = Solved()
    found = registry.engine("implicit", {"solver": "rest", "strict": True, "tol": 1e-8}).estimate(
        problem, problem.params(), {}, problem.batch(0, World()), Key(0), World()
    )
    assert float(found.metrics["iterations"]) == 0
    plain = registry.engine("implicit").estimate(Shared(), problem.params(), {}, problem.batch(0, World()), Key(0), World())
    close(found.grads.values(), plain.grads.values(), 1e-7)


@pytest.mark.parametrize(
    "name",
    [
        "same_key_gives_the_same_bits",
        "parameters_buffers_and_state_are_left_as_they_were",
        "metrics_are_scalar_tensors_and_count_forwards",
        "nothing_returned_carries_a_graph",
        "loss_is_the_problems_own",
        "two_ranks_average_to_the_whole_batch",
        "predictions_are_made_without_a_graph_or_a_trace",
        "a_batch_with_nan_is_reported_and_leaves_nothing_behind",
    ],
)
def test_claims_hold_on_a_problem_that_settles(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        dict(checks(registry.engine("implicit", {"radius": 8, "jacobian": 0.1}), lambda: settling(torch.float64)))[name]()


def test_a_step_without_a_start_or_a_read_out_is_refused():
    class Bare(Problem):
        def params(self):
            return {"w": torch.zeros(2)}

        def losses(self, params, batch, buffers):
            return params["w"]

        def step(self, params, s, x):
            return s

    with pytest.raises(CapabilityError, match="must also say where the solve begins"):
        fit_check(registry.engine("implicit"), Bare())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"solver": "andersen"}, "Did you mean 'anderson'"),
        ({"adjoint": "neuman(3)"}, "unknown adjoint"),
        ({"tol": 0.0}, "tol=0.0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"jacobian": -1.0}, "jacobian=-1.0"),
        ({"radius": 2}, "radius=2"),
    ],
)
def test_the_engine_refuses_settings(settings, match):
    with pytest.raises(SettingError, match=match):
        registry.engine("implicit", settings)


def test_rest_as_the_solution_needs_a_problem_that_has_one():
    with pytest.raises(CapabilityError, match="takes a problem's own start"):
        estimated(pair()[0], solver="rest")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kind": "deep"}, "unknown kind"),
        ({"kind": "contracting", "activation": "gelu"}, "unknown activation"),
        ({"bound": 1.5}, "bound=1.5"),
        ({"solver": "x"}, "unknown solver"),
        ({"adjoint": "x"}, "unknown adjoint"),
    ],
)
def test_the_model_refuses_settings(settings, match):
    with pytest.raises(SettingError, match=match):
        models.build("deq", settings, input_shape=(64,), classes=10, key=Key(0))
