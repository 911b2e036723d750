"""Derivatives that a model takes within its own forward pass, as physics-informed and energy-based networks do: who can follow them."""

from torch._C._functorch import TransformType, get_interpreter_stack

from altgrad.errors import CapabilityError


def differentiated() -> bool:
    """Whether a derivative by torch.func is being taken around this call."""
    return any(interpreter.key() in {TransformType.Grad, TransformType.Jvp} for interpreter in get_interpreter_stack() or ())


def refused(what: str, reason: str) -> CapabilityError:
    """The error of a rule that cannot follow such a derivative."""
    return CapabilityError(
        f"{what} is called while the model takes a derivative within its own forward pass (torch.func.jvp, grad, vjp, or autograd.grad): {reason}. "
        "Use es, eggroll or spsa, which move the parameters themselves and follow it exactly, or backprop."
    )


__all__ = ["differentiated", "refused"]
