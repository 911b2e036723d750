"""Planted bugs of straight-through. A new one goes at the end of the list, its change above it."""

from mutants_form import Mutant, altered, patched, scaled

from altgrad.engines.straight_through import StraightThrough
from altgrad.surrogates.pointwise import Quantised
from altgrad.surrogates.replacing import Replacing

CHOSEN, SHARE = Replacing.chosen, StraightThrough.share
CLAIM = ("is_exact_for_the_stand_in_derivative",)


def models_own(self, own, role):
    return own, own


def never_real(self, own, role):
    return own, CHOSEN(self, own, role)[1]


def real_everywhere(self, own, role):
    return CHOSEN(self, own, "weight")


def unmoved(self, own, role):
    self.share = None
    return CHOSEN(self, own, role)


def reversed_in_time(self, problem, step):
    return 1 - SHARE(self, problem, step)


def without_derivative(ctx, grad):
    return grad, None, None


def of_the_output(ctx, grad):
    (x,) = ctx.saved_tensors
    return grad * ctx.slope.derivative(x.sign()), None, None


MUTANTS = [
    Mutant("the whole gradient reversed", altered(StraightThrough, scaled(-1)), CLAIM),
    Mutant("the model's own surrogate kept", StraightThrough(estimator="ede"), CLAIM, patched(Replacing, "chosen", models_own)),
    Mutant("surrogates that stay as they are", StraightThrough(estimator="ede"), CLAIM, patched(Replacing, "chosen", unmoved)),
    Mutant("a schedule from its end to its beginning", StraightThrough(estimator="ede"), CLAIM, patched(StraightThrough, "share", reversed_in_time)),
    Mutant("weights quantised from the start", StraightThrough(real_weights=0.5), CLAIM, patched(Replacing, "chosen", never_real)),
    Mutant("activations real in the first stage", StraightThrough(real_weights=0.5), CLAIM, patched(Replacing, "chosen", real_everywhere)),
    Mutant("every surrogate the identity's", StraightThrough(), CLAIM, patched(Quantised, "backward", staticmethod(without_derivative))),
    Mutant("the surrogate taken at the output", StraightThrough(), CLAIM, patched(Quantised, "backward", staticmethod(of_the_output))),
]
