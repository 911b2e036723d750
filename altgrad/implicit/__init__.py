"""Implicit differentiation: roots and fixed points whose derivatives are right in every direction and order, or say that they are not."""

from altgrad.implicit.adjoints import AdjointInfo
from altgrad.implicit.calls import custom_fixed_point, custom_root, fixed_point, root
from altgrad.implicit.equation import Info

__all__ = ["AdjointInfo", "Info", "custom_fixed_point", "custom_root", "fixed_point", "root"]
