"""Mixed: each block has its own rule, whose estimate is the one it makes with all other parameters frozen; one loss, one optimizer, one state."""

import inspect
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from console import elsewhere, invoke  # noqa: F401  (elsewhere is a fixture)
from test_resume import contents, rows
from torch import nn

from altgrad import Key, Learner, fit_check, registry, trainer, value_and_grad
from altgrad import compare as comparing
from altgrad.alignment import exact_gradient
from altgrad.conformance import probes
from altgrad.conformance.claim import same_bits, same_tree
from altgrad.doctor import examine
from altgrad.engine import Bias, Needs, Split
from altgrad.engines.backprop import Backprop
from altgrad.engines.evolution import ES, SPSA
from altgrad.engines.forward import Forward
from altgrad.engines.likelihood_ratio import LikelihoodRatio
from altgrad.engines.mixed import WEAKER, Mixed
from altgrad.engines.subspace import RandomSubspace, Z
from altgrad.errors import CapabilityError, SettingError, UsageError
from altgrad.problem import Problem
from altgrad.problems.held import Held
from altgrad.problems.supervised import Supervised
from altgrad.trainer import TrainSettings
from altgrad.world import World

ADAPTING = "es,population=6,shaping=nes,adapt=nes"  # its state is one log sigma
RULES = [
    "backprop",
    "forward,tangents=3",
    "forward,tangents=2,space=weights,guess=momentum",
    "likelihood-ratio,copies=3",
    "likelihood-ratio,copies=4,layerwise=true",
    "likelihood-ratio,copies=4,sigma_rate=0.1,baseline=mean",
    "eggroll,population=6,shaping=raw",
    ADAPTING,
    "spsa",
]


def mix(rest, **parts):
    return Mixed(rest, {name.lstrip("_"): rule for name, rule in parts.items()})


def begun(rule, problem):
    params = {**problem.params(), **rule.aux(problem, Key(1))}
    return params, rule.init(problem, params, Key(1))


def estimate(rule, problem, *, rounds=1):
    """The estimate of the last of some rounds, in which the state runs on."""
    params, state = begun(rule, problem)
    for step in range(rounds):
        found = rule.estimate(problem, params, state, problem.batch(0, World()), Key(2, step), World())
        state = found.state
    return found


def frozen_but(prefix, problem):
    for name, parameter in problem.model.named_parameters():
        parameter.requires_grad_(name.startswith(prefix))
    return problem


def of(prefix, grads):
    return {name: grads[name] for name in grads if name.startswith(prefix)}


class Box(nn.Module):
    """`function` with nothing behind it: what comes in must not require grad."""

    def __init__(self, function):
        super().__init__()
        self.function, self.recorded = function, []

    def forward(self, x):
        self.recorded.append(x.requires_grad)
        return self.function(x)


def in_numpy(x):
    return torch.from_numpy(x.numpy().round(1))


def boxed(function):
    """Linear, a black box, tanh, linear (`3`)."""
    return probes.Probe(lambda: nn.Sequential(nn.Linear(3, 5), Box(function), nn.Tanh(), nn.Linear(5, probes.CLASSES)), probes.data("network", 3))


# -- what an estimate is -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_part_estimates_bit_for_bit_what_its_rule_does_with_the_others_frozen(rule):
    mixed = estimate(mix("backprop", _2=rule), probes.network(), rounds=2)
    alone = estimate(mix(rule).rest, frozen_but("2.", probes.network()), rounds=2)
    assert same_tree(of("2.", mixed.grads), dict(alone.grads))


@pytest.mark.parametrize("rule", RULES)
def test_what_backprop_has_of_a_mix_is_backprops_bit_for_bit(rule):
    found, plain = estimate(mix(rule, _4="backprop"), probes.network()), estimate(Backprop(), probes.network())
    assert same_tree(of("4.", found.grads), of("4.", plain.grads))
    assert set(found.grads) == set(plain.grads)


def test_backprop_everywhere_is_backprop():
    found, plain = (estimate(rule, probes.normalised()) for rule in (mix("backprop", body="backprop", norm="backprop"), Backprop()))
    assert same_tree(dict(found.grads), dict(plain.grads))
    assert same_bits(found.loss, plain.loss)
    assert same_tree(found.buffers, plain.buffers)


def test_a_mix_without_parts_is_its_rest():
    found, alone = (estimate(rule, probes.network()) for rule in (mix("eggroll,population=6"), mix("eggroll,population=6").rest))
    assert same_tree(dict(found.grads), dict(alone.grads))


def test_loss_and_running_statistics_are_those_of_the_part_nearest_to_backprop():
    found, plain = (estimate(rule, probes.normalised()) for rule in (mix("es,population=6", norm="likelihood-ratio,copies=2", head="backprop"), Backprop()))
    assert same_bits(found.loss, plain.loss)
    assert same_tree(found.buffers, plain.buffers)


def test_others_see_what_a_subspace_makes_of_its_block():
    problem = probes.network(torch.float64)
    rule = mix("backprop", _2="random-subspace,dimension=4,inner=backprop")
    params, state = begun(rule, problem)
    (own,) = [name for name in params if name.endswith(Z)]
    params[own] = torch.linspace(0.5, 2.0, 4, dtype=torch.float64)
    batch = problem.batch(0, World())
    found = rule.estimate(problem, params, state, batch, Key(2), World())
    there = {name: value for name, value in rule.bake(problem, params, state).items() if name != own}
    assert not torch.equal(there["2.weight"], params["2.weight"])
    exact = exact_gradient(problem, there, batch, Key(2))[1]
    assert torch.allclose(found.grads["4.weight"], exact["4.weight"], rtol=1e-12)
    assert torch.equal(rule.predict(problem, params, state, batch.inputs), problem.forward(there, batch.inputs, {}))


def test_passes_add_up_and_other_metrics_carry_their_part():
    found = estimate(mix("likelihood-ratio,copies=3", _4="backprop", _2="eggroll,population=6"), probes.network()).metrics
    assert float(found["forwards"]) == (3 + 1) + 1 + 6
    assert float(found["backwards"]) == 1
    assert float(found["sigma"]) == pytest.approx(0.1)
    assert float(found["sigma@2"]) == pytest.approx(0.01)


def test_states_of_one_name_are_kept_apart():
    rule = mix(ADAPTING, _2="es,population=6,shaping=nes,adapt=nes,sigma=0.5")
    state = begun(rule, probes.network())[1]
    assert sorted(round(float(value.exp()), 6) for value in state.values()) == [0.01, 0.5]
    assert set(estimate(rule, probes.network()).state) == set(state)


def test_gradients_stay_lazy_where_a_part_makes_them_so():
    assert isinstance(estimate(mix("backprop", _2="likelihood-ratio,copies=2"), probes.network()).grads, dict)
    assert not isinstance(estimate(mix("backprop", _2="eggroll,population=6"), probes.network()).grads, dict)


def test_functions_of_a_list_of_tensors_can_be_mixed():
    points = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    rule = mix("backprop", _1="forward,space=weights,tangents=2")
    value, grads = value_and_grad(lambda p: (p[0] ** 2).sum() + p[1].sum() * 5, engine=rule)(points)
    assert float(value) == 20
    assert torch.equal(grads[0], 2 * points[0])
    assert float(grads[1]) != 0


# -- black boxes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [torch.sign, torch.round, torch.detach, in_numpy], ids=["sign", "round", "detach", "numpy"])
def test_a_head_backpropagates_behind_a_black_box_that_no_graph_enters(function):
    problem = boxed(function)
    found = estimate(mix("likelihood-ratio,copies=4,sigma=1.0", _3="backprop"), problem)
    assert not any(problem.model[1].recorded)
    assert all(bool(found.grads[name].any()) for name in ("0.weight", "3.weight"))


@pytest.mark.parametrize("function", [torch.detach, lambda x: torch.from_numpy(x.detach().numpy())], ids=["detach", "numpy"])
def test_backprop_before_a_black_box_is_refused_by_the_name_of_its_part(function):
    with pytest.raises(CapabilityError, match=r"in the part '0' of the mix: no derivative gets from the loss to '0.weight'.* likelihood-ratio or es"):
        estimate(mix("likelihood-ratio,copies=2", _0="backprop"), boxed(function))


def test_numpy_that_meets_a_graph_is_refused_by_the_name_of_the_part():
    with pytest.raises(CapabilityError, match=r"in the part '0' of the mix: no derivative .*numpy"):
        estimate(mix("likelihood-ratio,copies=2", _0="backprop"), boxed(lambda x: torch.from_numpy(x.numpy())))


@pytest.mark.parametrize("rule", ["backprop", "forward,tangents=2"])
def test_derivatives_that_are_all_zero_are_a_warning_said_once(rule):
    problem, engine = boxed(torch.sign), mix("likelihood-ratio,copies=2", _0=rule)
    with pytest.warns(UserWarning, match="part '0' of the mix.* zero"):
        estimate(engine, problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate(engine, problem)


def test_hard_signs_learn_digits_below_a_head_that_backpropagates():
    def accuracy(**how):
        problem = registry.problem("digits").build(Key(0), model="mlp", model_settings={"hidden": "12", "activation": "sign"})
        problem.model[0].requires_grad_("at" in how)
        learner = Learner(problem.model, nn.CrossEntropyLoss(), **how)
        optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
        for step in range(60):
            optimizer.zero_grad()
            learner.backward(*problem.batch(step, World())[:2])
            optimizer.step()
        return problem.evaluate(learner.predict)["accuracy"]

    assert accuracy(engine="backprop") < 0.65  # the body as it was drawn
    assert accuracy(engine="likelihood-ratio", at={"2": "backprop"}, copies=8, sigma=0.5) > 0.75


# -- which parameters go where -----------------------------------------------------------------------------------------------------


def test_the_first_pattern_that_matches_takes_a_parameter_and_a_module_takes_all_below_it():
    rule = Mixed(Backprop(), [("body.0.bias", "spsa"), ("body", "forward"), ("head.?", "es"), ("*.weight", "eggroll")])
    shares = {part.label: part.names for part in rule.split_up(probes.normalised())}
    assert shares == {
        "body.0.bias": ("body.0.bias",),
        "body": ("body.0.weight",),
        "head.?": ("head.1.weight", "head.1.bias", "head.3.weight", "head.3.bias"),
        "*.weight": ("norm.weight",),
        "the rest": ("norm.bias",),
    }


def test_at_puts_an_engine_behind_the_patterns_there_are():
    made = LikelihoodRatio(copies=2).at("head", "backprop").at("body.*", ("forward", {"tangents": 8})).at("norm", "es,population=4")
    assert made == Mixed(LikelihoodRatio(copies=2), (("head", Backprop()), ("body.*", Forward(tangents=8)), ("norm", ES(population=4))))
    assert Mixed(made, {"tail": "spsa"}).rest == LikelihoodRatio(copies=2)


def test_a_part_may_be_a_mix_of_its_own_share():
    inner = mix("likelihood-ratio,copies=2").at("2.bias", "forward,tangents=3")
    found = estimate(mix("backprop", _2=inner, _0="spsa"), probes.network())
    apart = estimate(mix("backprop", **{"2.bias": "forward,tangents=3", "_2": "likelihood-ratio,copies=2", "_0": "spsa"}), probes.network())
    assert same_tree(dict(found.grads), dict(apart.grads))


def test_a_value_may_hold_commas_of_its_own():
    assert mix("likelihood-ratio,layers=0,2,copies=3").rest == LikelihoodRatio(layers="0,2", copies=3)


def test_settings_survive_json():
    rule = mix("likelihood-ratio,copies=2", _0="backprop", _2="random-subspace,inner=eggroll,dimension=3,inner_settings=sigma=0.5;population=4")
    assert registry.engine("mixed", json.loads(json.dumps(rule.settings()))) == rule


def test_an_engine_from_elsewhere_is_spelled_by_its_module():
    class Mine(Backprop):
        pass

    assert Mixed(Mine()).settings()["rest"][0].startswith("test_mixed:")


# -- traits ------------------------------------------------------------------------------------------------------------------------


def test_needs_are_those_of_all_parts_and_the_bias_is_the_weakest():
    rule = mix("likelihood-ratio", _0="forward", _2="backprop")
    assert rule.needs == Needs.VALUE | Needs.TANGENT | Needs.REVERSE
    assert (rule.bias, mix("forward", _0="backprop").bias, mix("backprop", _0="backprop").bias) == (Bias.SMOOTHED, Bias.UNBIASED, Bias.EXACT)
    assert set(WEAKER) == set(Bias)
    assert "Jiang" in rule.source
    assert "Rumelhart" in rule.source


def test_ranks_divide_a_population_where_a_part_has_one():
    assert mix("backprop", _0="likelihood-ratio").split is Split.DATA
    assert mix("backprop", _0="es").split is Split.POPULATION


# -- the view of a share -----------------------------------------------------------------------------------------------------------


def test_a_share_hands_on_every_view_of_its_problem():
    views = {name for name, _ in inspect.getmembers(Problem) if not name.startswith("_")}
    own = {"recall", "fresh_buffers", "name", "differentiable", "discrete", "steps_per_epoch", "horizon"}  # made of what is handed on, or set
    assert views - own - {"blocks"} <= set(vars(Held))  # blocks are cut from a whole model: Held does not provide them


def test_a_share_is_what_its_problem_is_and_keeps_facts_of_its_own():
    problem = probes.network()
    view, other = (Held(problem, names, problem.params()) for names in (["0.weight"], ["4.bias"]))
    assert isinstance(view, Supervised)
    assert view.model is problem.model
    view.recall("a fact", lambda: 1)
    assert (other.recall("a fact", lambda: 2), problem.recall("a fact", lambda: 3)) == (2, 3)
    assert Held(problem, ["0.weight"], problem.params()).recall("a fact", lambda: 4) == 1


# -- training ----------------------------------------------------------------------------------------------------------------------


def settings(**changes):
    parts = (("0.weight", "random-subspace", {"dimension": 9, "inner": "es", "inner_settings": "population=6,shaping=nes,adapt=nes"}), "2=backprop")
    rest = ("likelihood-ratio", {"copies": 4, "sigma_rate": 0.1})
    return TrainSettings(**{"problem": "blobs:Blobs", "engine": "mixed", "engine_settings": {"rest": rest, "parts": parts}, "lr": 0.05, "steps": 13, **changes})


def test_resume_is_bit_exact(tmp_path):
    trainer.fit(trainer.build(settings()), run_folder=tmp_path / "unbroken")
    trainer.fit(trainer.build(settings()), run_folder=tmp_path / "broken", on_step=lambda training, row: training.step == 7)
    trainer.fit(trainer.resume(tmp_path / "broken"))
    assert contents(tmp_path / "broken")[:2] == contents(tmp_path / "unbroken")[:2]
    assert rows(tmp_path / "broken")[-1] == rows(tmp_path / "unbroken")[-1]


def test_the_command_line_mixes_saves_the_mix_and_resumes_it():
    run = ("train", "--problem", "blobs:Blobs", "--engine", "likelihood-ratio", "-s", "copies=4", "--at", "2=backprop", "--at", "0.bias=forward,tangents=3")
    done = invoke(*run, "--steps", 6, "--save-every", 3, "--out", "a", "--json")
    assert done.exit_code == 0, done.stderr
    resumed = trainer.resume("a")
    assert resumed.engine == LikelihoodRatio(copies=4).at("2", Backprop()).at("0.bias", Forward(tangents=3))
    assert resumed.step == 6
    assert invoke("resume", "a").exit_code == 0


def test_compare_mixes_every_engine_it_is_given(monkeypatch):
    seen = []

    def compared(settings, **_):
        seen.append({choice.label: choice.build() for choice in settings.engines})
        raise UsageError("seen enough")

    monkeypatch.setattr(comparing, "compare", compared)
    done = invoke("compare", "--problem", "blobs:Blobs", "--engines", "likelihood-ratio[copies=2],spsa", "--at", "2=backprop", "--out", "c")
    assert "seen enough" in done.stderr
    assert seen == [{"likelihood-ratio copies=2, 2=backprop": LikelihoodRatio(copies=2).at("2", "backprop"), "spsa, 2=backprop": SPSA().at("2", "backprop")}]


def test_the_doctor_tries_every_engine_beside_the_parts():
    problem = boxed(torch.detach)
    report = examine(problem.model, problem.inputs, loss=F.cross_entropy, targets=problem.targets, at=["3=backprop"])
    fits = {fit.engine: fit for fit in report.engines}
    assert fits["likelihood-ratio, 3=backprop"].fits
    assert "no derivative gets from the loss to '0.weight'" in fits["backprop, 3=backprop"].reason
    with pytest.raises(SettingError, match="unknown parameter or module 'tail'"):
        examine(problem.model, problem.inputs, at=["tail=backprop"])


def test_a_learner_takes_engines_by_pattern_and_bakes_what_they_made():
    problem = probes.network()
    learner = Learner(problem.model, F.cross_entropy, engine="likelihood-ratio", copies=8, at={"2": RandomSubspace(dimension=6), "4": ("backprop", {})})
    head = set(problem.model[4].parameters())
    rates = [{"params": [p for p in learner.parameters() if p in head], "lr": 0.05}, {"params": [p for p in learner.parameters() if p not in head], "lr": 0.1}]
    optimizer = torch.optim.Adam(rates)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(float(learner.backward(problem.inputs, problem.targets).loss))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    before = learner.predict(problem.inputs)
    assert not torch.allclose(learner.model(problem.inputs), before)
    learner.bake()
    assert torch.allclose(learner.model(problem.inputs), before, atol=1e-6)


# -- mistakes ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Mixed(Backprop(), "head"), r"'head' .* write it as PATTERN=ENGINE"),
        (lambda: Mixed(Backprop(), "head="), r"write it as PATTERN=ENGINE"),
        (lambda: Mixed(Backprop(), 3), r"parts=3 is not allowed"),
        (lambda: Learner(nn.Linear(2, 2), F.cross_entropy, at=3), r"parts=3 is not allowed"),
        (lambda: Mixed(Backprop(), [("a", 3)]), r"3 is no engine; give an engine, its name"),
        (lambda: Mixed(Backprop(), "a=spsa;a=es"), r"two parts of the mix have the pattern 'a'"),
        (lambda: Mixed(Backprop(), "a=forward,tangent=3"), r"Did you mean 'tangents'"),
        (lambda: Mixed(Backprop(), "a=ask-tell"), r"ask-tell \(part 'a'\) cannot be mixed.*optimizer=SGD.*Use es"),
        (lambda: Backprop().at("a", "bakprop"), r"Did you mean 'backprop'"),
        (lambda: Mixed(",tangents=3"), r"names no engine"),
    ],
)
def test_mistakes_in_a_mix_say_what_to_write(make, said):
    with pytest.raises(UsageError, match=said):
        make()


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ("bodi=backprop", r"unknown parameter or module 'bodi'. Did you mean 'body'\?"),
        ("body=backprop;body.0=spsa", r"the part 'body.0' of the mix gets no parameters: 'body' before it takes them"),
        ("*=backprop", r"the rest of the mix gets no parameters: '\*' take them all"),
    ],
)
def test_patterns_that_do_not_fit_the_model_are_refused_before_the_first_step(parts, said):
    with pytest.raises(SettingError, match=said):
        fit_check(Mixed(Forward(), parts), probes.normalised())


def test_a_rule_that_the_problem_cannot_feed_is_named_with_its_part():
    class Undifferentiable(probes.Probe):
        differentiable = False

    problem = Undifferentiable(probes.network_model, probes.data("network", 3))
    with pytest.raises(CapabilityError, match=r"in the part '4' of the mix, Backprop\(\) needs REVERSE, which Undifferentiable with parameters held does not"):
        fit_check(mix("es", _4="backprop"), problem, alternatives=registry.needs)


def test_a_rule_that_reads_out_in_its_own_way_is_refused():
    class Own(Backprop):
        def predict(self, problem, params, state, inputs):
            return inputs

    with pytest.raises(CapabilityError, match=r"\(part 'head'\) cannot be mixed: it reads out in a way of its own"):
        Mixed(Backprop(), [("head", Own())])


def test_an_error_inside_a_part_names_it():
    with pytest.raises(CapabilityError, match=r"in the part '2' of the mix: guess='local' needs"):
        begun(mix("backprop", _2="forward,guess=local"), probes.network())
    with pytest.raises(SettingError, match=r"in the part 'the rest' of the mix: layers='2'"):
        begun(mix("likelihood-ratio,layers=2", _2="backprop"), probes.network())
