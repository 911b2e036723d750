"""Jacobian homeostasis as a loss that any rule can train: what it is added to, under which rules, and what it makes of a net."""

import pytest
import torch
from settled import KEY, drawn, feedback, layered, look
from tolerances import tolerance

from altgrad import registry, trainer
from altgrad.alignment import exact_gradient
from altgrad.engine import fit_check
from altgrad.engines.equilibrium import Equilibrium
from altgrad.equilibrium.feedback import LayeredFeedback
from altgrad.equilibrium.homeostasis import homeostasis, map_of
from altgrad.equilibrium.homeostatic import Homeostatic
from altgrad.equilibrium.settling import Settling, squared_error
from altgrad.errors import CapabilityError, SettingError
from altgrad.rng import Key
from altgrad.training import TrainSettings
from altgrad.world import World


def both(dtype=torch.float32, weight=1.0):
    """The same net with and without the loss, and a batch."""
    plain, batch = feedback(dtype)
    return Homeostatic(plain.model, squared_error, homeostasis=weight), plain, batch


def jacobian_of(problem, batch):
    """∂z/∂s of the first example at the state after the net's sweeps [d, d]."""
    state = [leaf[0] for leaf in problem.settled(problem.params(), batch.inputs)]
    sizes = [len(leaf) for leaf in state]

    def told(flat):
        return torch.cat([part[0] for part in map_of(problem)(problem.params(), tuple(part[None] for part in flat.split(sizes)), batch.inputs[:1])])

    return torch.autograd.functional.jacobian(told, torch.cat(state)).detach()


def estimated(problem, batch, name, settings):
    engine = registry.engine(name, settings)
    fit_check(engine, problem)
    params = {name: value.detach() for name, value in problem.params().items()}
    return engine.estimate(problem, params, engine.init(problem, params, KEY), batch, KEY, World())


RULES = [
    ("backprop", {}),
    ("forward", {"space": "weights", "tangents": 4}),
    ("forward", {"tangents": 4}),
    ("es", {"population": 8}),
    ("eggroll", {"population": 8, "shaping": "raw"}),
    ("spsa", {}),
    ("likelihood-ratio", {"copies": 4}),
]


@pytest.mark.parametrize(("name", "settings"), RULES, ids=[f"{name}-{len(settings)}" for name, settings in RULES])
def test_every_rule_sees_the_loss(name, settings):
    problem, plain, batch = both()
    weighed, bare = (estimated(view, batch, name, settings) for view in (problem, plain))
    with torch.no_grad():
        whole = float(problem.penalty(problem.params(), batch).mean())
    assert float(weighed.loss - bare.loss) == pytest.approx(whole, rel=0.5)  # other probes
    assert any(not torch.allclose(weighed.grads[name], bare.grads[name], rtol=1e-3) for name in bare.grads)


def test_its_gradient_under_backprop_is_that_of_the_loss_by_itself():
    problem, plain, batch = both(torch.float64)
    weighed, bare = (exact_gradient(view, view.params(), batch, KEY)[1] for view in (problem, plain))
    twice = exact_gradient(both(torch.float64, weight=2.0)[0], problem.params(), batch, KEY)[1]
    for name in bare:
        torch.testing.assert_close(twice[name] - bare[name], 2 * (weighed[name] - bare[name]), rtol=1e-9, atol=1e-12)
    assert float((weighed["backward_weights.0"] - bare["backward_weights.0"]).norm()) > 1e-3
    torch.testing.assert_close(weighed["weights.0"], bare["weights.0"], rtol=1e-9, atol=1e-12)  # the way in is no part of J


def test_it_is_half_the_squared_asymmetry_of_what_a_net_is_told():
    problem, _, batch = both(torch.float64)
    state = tuple(leaf[:1].expand(100_000, -1) for leaf in problem.settled(problem.params(), batch.inputs))
    size = sum(leaf.shape[1] for leaf in state)
    probes = drawn("many", 100_000, size).split([leaf.shape[1] for leaf in state], 1)
    one = batch.inputs[:1].expand(100_000, -1)
    with torch.no_grad():
        mean = homeostasis(lambda s: map_of(problem)(problem.params(), s, one), state, probes).mean()
    jacobian = jacobian_of(problem, batch)
    assert float(mean) == pytest.approx(float((jacobian - jacobian.T).square().sum() / (2 * size)), rel=0.02)


def test_the_difference_of_an_affine_map_is_its_derivative():
    problem, _, batch = both(torch.float64)
    state, along = problem.settled(problem.params(), batch.inputs), problem.settled(problem.params(), drawn("other", 6, 12))

    def told(s):
        return map_of(problem)(problem.params(), s, batch.inputs)

    torch.testing.assert_close(homeostasis(told, state, along, affine=True), homeostasis(told, state, along), rtol=1e-9, atol=1e-12)


def test_weights_that_agree_both_ways_cost_nothing():
    problem = Homeostatic(LayeredFeedback([12, 10, 8, 5], key=Key(3), angle=0.0).double(), squared_error, homeostasis=1.0)
    with torch.no_grad():
        assert float(problem.penalty(problem.params(), feedback()[1]).mean().abs()) < tolerance("rounding64")


def test_equilibrium_takes_the_problems_own_weight():
    problem, plain, batch = both()
    own = look(Equilibrium(correction="none"), problem, batch)
    asked = look(Equilibrium(correction="homeostasis", homeostasis=1.0), plain, batch)
    for name in own.grads:
        assert torch.equal(own.grads[name], asked.grads[name])
    assert "homeostasis" in own.metrics


def test_held_out_figures_are_those_of_the_loss_alone():
    problem, plain, batch = both()
    torch.testing.assert_close(problem.score(problem.predict(batch.inputs), batch.targets), plain.score(plain.predict(batch.inputs), batch.targets))


def test_a_negative_weight_is_refused():
    with pytest.raises(SettingError, match="homeostasis=-1"):
        Homeostatic(LayeredFeedback([3, 3, 3], key=Key(0)), squared_error, homeostasis=-1.0)


def test_it_is_refused_where_the_jacobian_is_symmetric_already():
    with pytest.raises(CapabilityError, match="an energy is symmetric already"):
        fit_check(Equilibrium(correction="homeostasis"), layered()[0])


def trained(weight, engine="equilibrium", **settings):
    """(accuracy, asymmetry at the end) after three epochs of digits."""
    asked = {"hidden": "48-48", "angle": 120.0, "homeostasis": weight}
    seen = []
    run = trainer.build(
        TrainSettings(problem="recurrent-digits", problem_settings=asked, engine=engine, engine_settings=settings, epochs=3, lr=5e-3, log_every=1000)
    )
    found = trainer.fit(run, on_step=lambda training, row: seen.append(row) and None)
    return found.test_accuracy, seen[-1].get("asymmetry")


def test_training_with_it_lowers_the_asymmetry_and_learns_where_the_plain_field_does_not():
    plain, with_it = (trained(weight, correction="none", tolerance=1e-2) for weight in (0.0, 10.0))
    assert with_it[1] < 0.4 * plain[1]
    assert with_it[0] > plain[0] + 0.1


def test_settling_without_weight_is_a_plain_problem():
    problem = registry.find("problem", "recurrent-digits")().build(Key(0))
    assert type(problem) is Settling
