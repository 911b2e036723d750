"""The conformance suite has teeth: every planted bug fails its claims, and every claim is failed by some planted bug."""

import pytest
from mutants import MUTANTS

from altgrad.conformance.claim import CLAIMS
from altgrad.testing import Violation, checks

PAIRS = [(mutant, claim) for mutant in MUTANTS for claim in mutant.caught_by]


@pytest.mark.parametrize(("mutant", "claim"), PAIRS, ids=[f"{mutant.name}-{claim}" for mutant, claim in PAIRS])
def test_planted_bug_fails_its_claim(mutant, claim):
    check = dict(checks(mutant.engine))[claim]
    with mutant.patch(), pytest.raises(Violation):
        check()


def test_every_claim_is_failed_by_a_planted_bug():
    assert set(CLAIMS) == {claim for _, claim in PAIRS}
