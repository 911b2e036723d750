"""A tensor with K tangents, and how a torch function finds its rule."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from altgrad.errors import CapabilityError
from altgrad.forward_mode.lazy import Lazy
from altgrad.inner import differentiated, refused

RULES: dict[Any, Callable[..., Any]] = {}  # torch function -> rule(trace, *args, **kwargs)
DECOMPOSED: set[Any] = set()  # the rules that stand in for a missing forward formula: counted
LAYERS: set[Any] = set()  # the rules of parametric layers, whose outputs may be perturbed
ATTRIBUTES = ("shape", "ndim", "dtype", "device")
KEEPING: set[Any] = {torch.Tensor.size, torch.Tensor.dim, *(getattr(torch.Tensor, name).__get__ for name in ATTRIBUTES)}  # leave waiting tangents waiting


class Source(Protocol):
    """Where a parameter's tangents come from; made on demand so that they need not be stored."""

    used: bool

    def dense(self) -> Tensor:
        """The tangents [K, *shape]."""
        ...


class Trace:
    """What one forward pass with `members` tangents notes down as it goes."""

    def __init__(self, members: int):
        self.members = members
        self.fallbacks: Counter[str] = Counter()  # "decomposition:lstm" -> calls
        self.rungs: dict[Any, str] = {}  # torch function -> the rung it was found to need
        self.mixes_examples: list[str] = []  # layers that computed with statistics over the batch
        self.waiting: list[weakref.ref[Dual]] = []  # those whose tangents are not made yet
        self.plain = False  # a replay: nothing but the layers' own perturbations matters, tangents do not flow

    def make(self) -> None:
        """Make every tangent that waits: before any function that may write, or hand out memory that is written to later."""
        for reference in self.waiting:
            dual = reference()
            if dual is not None and dual.lazy is not None:
                _ = dual.tangent
        self.waiting.clear()

    def draw_ahead(self, weight: Any, bias: Any, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """The noise of the site that comes next, drawn before its output exists; None where that cannot be known yet."""
        return None

    def base(self, drawn: Tensor) -> Tensor | Lazy | None:
        """A tensor that holds a site's noise and may be added to; None where the noise is not simply added."""
        return None

    def site(
        self,
        weight: Any,
        bias: Any,
        output: Tensor,
        tangent: Tensor | None,
        local: Callable[[Tensor], list[Tensor | None]],
        *,
        channel: int,
        drawn: Tensor | None = None,
        included: bool = False,
    ) -> Tensor | Lazy | None:
        """Where a parametric layer's output may be perturbed; plain traces leave the tangent alone."""
        return tangent

    def perturbed(self, output: "Dual") -> None:
        """Told of the Dual that a site's output became."""

    def met(self, func: Any, args: Any, kwargs: Any) -> None:
        """Told of every function that meets a Dual, before it runs."""


class Dual(torch.Tensor):
    """A tensor that carries tangents [K, *shape] through every torch function that meets it."""

    primal: Tensor
    taken_on: Trace  # (`trace` is a tensor's own method)
    source: Any
    lazy: Lazy | None
    site: str | None = None  # the site whose output it is, where that is known
    _tangent: Tensor | None

    @staticmethod
    def __new__(cls, primal: Tensor, tangent: Tensor | Lazy | None, trace: Trace, source: Any = None) -> "Dual":
        self = torch.Tensor._make_wrapper_subclass(cls, primal.shape, strides=primal.stride(), dtype=primal.dtype, device=primal.device)
        self.primal, self.lazy, self._tangent, self.taken_on, self.source = primal, None, None, trace, source
        if isinstance(tangent, Lazy):
            self.lazy = tangent
            trace.waiting.append(weakref.ref(self))
        else:
            self._tangent = tangent
        return self

    @property
    def tangent(self) -> Tensor:
        """The tangents [K, *shape], made now where they wait or come from a source."""
        if self.lazy is not None:
            self._tangent, self.lazy = self.lazy.whole(), None
        return self._tangent if self._tangent is not None else self.source.dense()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise CapabilityError(f"a tensor with tangents reached {func} without passing a torch function; its tangent would be lost.")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Dual({self.primal!r}, members={self.taken_on.members})"


FLAT = {Dual, torch.Tensor, torch.nn.Parameter, int, float, bool, type(None), type, torch.dtype, torch.device}


def primal_of(value: Any) -> Any:
    """The tensor without its tangents."""
    return value.primal if isinstance(value, Dual) else value


def tangent_of(value: Any) -> Tensor | None:
    """The tangents [K, *shape], or None where the value carries none."""
    return value.tangent if isinstance(value, Dual) else None


def strip(tree: Any) -> Any:
    """A nest of values without tangents."""
    return tree_map(primal_of, tree)


def find_trace(args: Any, kwargs: Any) -> Trace:
    """The trace of the first Dual among the arguments."""
    for leaf in args:  # nearly always there, and found without a walk through nests
        if isinstance(leaf, Dual):
            return leaf.taken_on
    return next(leaf.taken_on for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Dual))


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` on arguments some of which are Duals."""
    trace = find_trace(args, kwargs)
    if differentiated():
        raise refused(label(func), "a tensor's tangents do not pass through it")
    trace.met(func, args, kwargs)
    if trace.waiting and func not in KEEPING:
        trace.make()
    if not torch.is_grad_enabled():  # inside the model's own no_grad, autograd would not follow either
        return run_plain(func, args, kwargs)
    rule = RULES.get(func)
    if trace.plain and func not in LAYERS:
        return run_plain(func, args, kwargs)
    if rule is not None:
        if func in DECOMPOSED:
            trace.fallbacks[f"decomposition:{label(func)}"] += 1
        return rule(trace, *args, **kwargs)
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return read_property(func, args, kwargs)
    if name in CONSTANT:
        return run_plain(func, args, kwargs)
    if writes_in_place(name) or kwargs.get("out") is not None or kwargs.get("inplace"):
        return in_place(func, name, args, kwargs)
    from altgrad.forward_mode.ladder import lift

    return lift(trace, func, args, kwargs)


def run_plain(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` on the primals alone."""
    if not kwargs and all(type(value) in FLAT for value in args):  # no nests to walk through: attributes, comparisons
        return func(*(primal_of(value) for value in args))
    args, kwargs = strip((args, kwargs))
    return func(*args, **kwargs)


def read_property(func: Any, args: Any, kwargs: Any) -> Any:
    """Attributes: sizes and dtypes are the primal's; views such as `.T` keep their tangents."""
    value = run_plain(func, args, kwargs)
    if not isinstance(value, Tensor) or label(func) in {"data", "grad"}:
        return value
    from altgrad.forward_mode.ladder import lift

    return lift(find_trace(args, kwargs), func, args, kwargs)


def writes_in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or (name.startswith("__i") and name in OUT_OF_PLACE)


def in_place(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A function that writes: computed out of place, then copied into the value and the tangents (whose views alias alike)."""
    kwargs = dict(kwargs)
    target = kwargs.pop("out", None)
    if target is None:
        target = args[0]
    if kwargs.pop("inplace", False) or name == func.__name__.rstrip("_"):
        result = func(*args, **kwargs)
    elif name == "__setitem__":
        result = written(target, args[1], args[2])
    else:
        outer = OUT_OF_PLACE.get(name) or getattr(torch.Tensor, name[:-1], None) or getattr(torch, name[:-1], None)
        if outer is None:
            raise CapabilityError(f"the in-place function {name} has no out-of-place form to differentiate; use one that has.")
        result = outer(*args, **kwargs)  # type: ignore[operator]
    if not isinstance(target, Dual):
        if name.startswith("__i"):
            return result  # `x += dual` rebinds x, so a new tensor serves
        raise CapabilityError(
            f"{name or label(func)} writes a value that depends on the parameters into a tensor that does not; "
            "build the result out of place (x = x + y, torch.stack, torch.cat, torch.where) so that its derivative can be followed."
        )
    if target.source is not None:
        raise CapabilityError(f"{name} would change a parameter in place during the forward pass.")
    target.primal.copy_(primal_of(result))
    tangent = tangent_of(result)
    target._tangent = torch.zeros_like(target.tangent) if tangent is None else target.tangent.copy_(tangent.expand_as(target.tangent))
    return target


def written(target: Any, index: Any, value: Any) -> Any:
    """`target` with `target[index] = value`, out of place."""
    from altgrad.forward_mode.ladder import lift

    if not isinstance(target, Dual):
        return target

    def put(base: Tensor, new: Any) -> Tensor:
        base = base.clone()
        base[index] = new
        return base

    return lift(target.taken_on, put, (target, value), {})


def apply(function: Callable[..., Any], *args: Any) -> Any:
    """`function` of plain tensors, lifted as a whole: tangents are pushed through it where any argument carries some."""
    if not any(isinstance(leaf, Dual) for leaf in tree_leaves(args)):
        return function(*args)
    from altgrad.forward_mode.ladder import lift

    return lift(find_trace(args, {}), function, args, {})


def label(func: Any) -> str:
    """A short name for a torch function."""
    owner = getattr(getattr(func, "__self__", None), "__name__", "") if getattr(func, "__name__", "") == "__get__" else ""
    return owner or getattr(func, "__name__", str(func))


OUT_OF_PLACE = {
    "__iadd__": torch.Tensor.add,
    "__isub__": torch.Tensor.sub,
    "__imul__": torch.Tensor.mul,
    "__itruediv__": torch.Tensor.div,
    "__ipow__": torch.Tensor.pow,
    "relu_": torch.relu,
}

# Functions of the primal alone: sizes, comparisons, indices, and detach (whose tangent autograd also drops).
CONSTANT = frozenset(
    """
    size dim ndimension numel nelement stride storage_offset element_size is_floating_point is_complex is_contiguous data_ptr get_device __len__
    __bool__ item tolist __float__ __int__ __index__ __contains__ eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ argmax argmin
    argsort isnan isinf isfinite detach equal allclose new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like empty_like
    full_like rand_like randn_like randint_like nonzero any all logical_not logical_and logical_or sign sgn round floor ceil bool int long short
    byte numpy is_nonzero result_type __hash__ __dir__ __format__ __repr__ __str__ is_signed bernoulli multinomial searchsorted bucketize
    one_hot is_cuda is_sparse is_quantized requires_grad_ register_hook retain_grad isclose histc bincount count_nonzero isin is_pinned
    is_inference can_cast __array__
    """.split()
)
