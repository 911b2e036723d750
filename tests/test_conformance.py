"""Every case of cases.py against every claim its traits make."""

import pytest
from cases import CASES

from altgrad import registry, testing
from altgrad.conformance.claim import CLAIMS
from altgrad.engine import Bias, Needs
from altgrad.errors import CapabilityError
from altgrad.testing import Violation, checks

PAIRS = [(case, name, check) for case in CASES for name, check in checks(case.engine)]


@pytest.mark.parametrize(("case", "name", "check"), PAIRS, ids=[f"{case.id}-{name}" for case, name, _ in PAIRS])
def test_engine_keeps_the_claims_of_its_traits(case, name, check):
    if name in case.refuses:
        with pytest.raises(CapabilityError, match=r"use guess|needs a model|unknown parameter or module|needs ENERGY, FIXED_POINT or BLOCKS"):
            check()
    elif name in case.departs:
        with pytest.raises(Violation):
            check()
    else:
        check()


def test_every_engine_of_the_table_has_a_case():
    assert {case.name for case in CASES} == set(registry.table("engine"))


def test_every_claim_is_made_for_some_case():
    made = {name for _, name, _ in PAIRS}
    waiting = {name for name, claim in CLAIMS.items() if not any(claim.applies(case.engine) for case in CASES)}
    assert made | waiting == set(CLAIMS)
    assert not waiting


def test_traits_decide_which_claims_are_made():
    exact, unbiased, guided = (
        {name for name, _ in checks(registry.engine(*rule))}
        for rule in (("backprop", {}), ("forward", {}), ("forward", {"space": "weights", "combine": "orthogonal"}))
    )
    assert "is_exact_on_network" in exact
    assert "keeps_no_reverse_graph" not in exact
    assert {"is_unbiased_on_network", "keeps_no_reverse_graph"} <= unbiased
    assert "is_not_reversed_on_network" in guided
    assert "is_unbiased_on_network" not in guided


def test_run_reports_names_outcomes_and_refusals():
    results = {result.name: result for result in testing.run(registry.engine("backprop", {"checkpointing": True}))}
    assert all(result.passed for result in results.values())
    assert results["is_exact_on_quadratic"].refused
    assert "nn.Sequential" in results["is_exact_on_quadratic"].as_dict()["detail"]


def test_run_reports_a_failure_with_what_was_seen():
    class Loud(type(registry.engine("backprop", {}))):
        source = ""

    failed = [result for result in testing.run(Loud()) if not result.passed]
    assert [result.name for result in failed] == ["traits_are_declared_and_settings_are_plain"]
    assert "source ''" in failed[0].detail


def test_an_engine_that_the_default_problem_cannot_feed_is_refused_with_a_reason():
    class Hungry(type(registry.engine("backprop", {}))):
        needs = Needs.ENERGY
        bias = Bias.LIMIT

    with pytest.raises(CapabilityError, match="Implement energy"):
        list(checks(Hungry()))


def test_claims_that_hold_anywhere_are_checked_on_the_callers_problem():
    from altgrad.conformance import probes

    made = []

    def factory():
        made.append(probes.quadratic())
        return made[-1]

    for name, check in checks(registry.engine("backprop", {}), factory):
        if name == "loss_is_the_problems_own":
            before = len(made)
            check()
            assert len(made) == before + 1
