"""Names to classes: what is pointed at must be what it is used as, and somebody's broken entry point breaks nothing else."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import toys
from console import elsewhere, invoke  # noqa: F401  (elsewhere is a fixture)

from altgrad import errors, registry
from altgrad.engine import Needs, fit_check
from altgrad.rng import Key


@pytest.fixture
def broken(monkeypatch):
    """An engine and a problem whose modules cannot be imported."""
    points = {group: [EntryPoint("broken", "nowhere_at_all:Thing", group)] for group in registry.KINDS.values()}
    monkeypatch.setattr(registry, "entry_points", lambda group: points[group])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "json:loads"], "engine 'json:loads' is a function; it must be a subclass of altgrad.Engine"),
        (["--engine", "json:JSONDecoder"], "engine 'json:JSONDecoder' is the class JSONDecoder; it must be a subclass of altgrad.Engine"),
        (["--engine", "altgrad.rng:Key"], "engine 'altgrad.rng:Key' is the class Key; it must be a subclass of altgrad.Engine"),
        (["--problem", "json:loads"], "problem 'json:loads' is a function; it must be a dataclass of settings with build(key)"),
        (["--problem", "altgrad.kernels.noise"], "unknown problem"),
    ],
)
def test_what_is_no_engine_or_problem_leaves_with_2(arguments, message):
    done = invoke("train", *arguments, "--out", "a")
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_class_that_is_no_dataclass_has_no_settings():
    with pytest.raises(errors.UsageError, match="thing is the class Key2; it must be a dataclass"):
        registry.build(type("Key2", (), {}), {}, "thing")


def test_a_setting_without_a_default_must_be_given():
    @dataclass(frozen=True)
    class Needy:
        size: int

    assert registry.build(Needy, {"size": "3"}, "needy").size == 3
    with pytest.raises(errors.SettingError, match="needy needs the setting size, which has no default; give size=VALUE"):
        registry.build(Needy, {}, "needy")


def test_a_broken_entry_point_is_no_alternative(broken):
    needs = registry.needs()
    assert needs["backprop"] == Needs.REVERSE
    assert "broken" not in needs


@pytest.mark.parametrize("listing", ["engines", "problems"])
def test_a_broken_entry_point_is_a_warning_in_a_listing(broken, listing):
    done = invoke(listing)
    assert done.exit_code == 0
    assert f"Warning: {listing[:-1]} 'broken' is left out" in done.stderr
    assert "\nbackprop " in done.stdout or "\ndigits " in done.stdout


def test_alternatives_are_looked_up_only_where_a_need_is_missing():
    asked = []

    def alternatives():
        asked.append(1)
        return {"other": Needs.VALUE}

    problem = toys.LeastSquaresFactory().build(Key(0))
    fit_check(toys.Noisy(), problem, alternatives=alternatives)
    assert asked == []
    problem.differentiable = False
    with pytest.raises(errors.CapabilityError, match="or use one of: other"):
        fit_check(registry.engine("backprop"), problem, alternatives=alternatives)
    assert asked == [1]


@pytest.mark.parametrize(
    ("module", "message"), [("sklearn.svm", "scikit-learn"), ("PIL", "pillow"), ("pytorch_optimizer", "pytorch-optimizer"), ("torch._C", "torch")]
)
def test_a_missing_package_is_named_as_the_index_names_it(module, message):
    found = errors.missing_extra(ModuleNotFoundError("", name=module), "this")
    assert f"this needs the package {message}, which is not installed. Run: pip install 'altgrad[" in str(found)


def test_a_missing_package_that_is_nobodys_extra_stays_what_it_is():
    assert errors.missing_extra(ModuleNotFoundError("", name="nowhere"), "this") is None
