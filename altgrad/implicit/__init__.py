"""Implicit differentiation: roots and fixed points whose derivatives are right in every direction and order, or say that they are not."""

from altgrad.implicit.adjoints import AdjointInfo
from altgrad.implicit.calls import custom_fixed_point, custom_root, fixed_point, root
from altgrad.implicit.conditions import kkt, mirror_descent, projected_gradient, proximal_gradient, stationary
from altgrad.implicit.equation import Info, Solved
from altgrad.implicit.estimators import elastic_net, lasso, logistic_regression, ridge, svm
from altgrad.implicit.projections import project_box, project_l1_ball, project_l2_ball, project_nonnegative, project_simplex
from altgrad.implicit.proxes import prox_elastic_net, prox_group_lasso, prox_l1
from altgrad.implicit.quadratic import Optimum, qp
from altgrad.implicit.safeguarded import SafeguardedNewton
from altgrad.implicit.transport import sinkhorn

__all__ = [
    "AdjointInfo",
    "Info",
    "Optimum",
    "SafeguardedNewton",
    "Solved",
    "custom_fixed_point",
    "custom_root",
    "elastic_net",
    "fixed_point",
    "kkt",
    "lasso",
    "logistic_regression",
    "mirror_descent",
    "project_box",
    "project_l1_ball",
    "project_l2_ball",
    "project_nonnegative",
    "project_simplex",
    "projected_gradient",
    "prox_elastic_net",
    "prox_group_lasso",
    "prox_l1",
    "proximal_gradient",
    "qp",
    "ridge",
    "root",
    "sinkhorn",
    "stationary",
    "svm",
]
