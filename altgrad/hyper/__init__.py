"""Hyper-gradients: the derivative of a validation loss in what a training run was given, by the implicit function theorem or by replaying the run."""

from altgrad.hyper.descent import Descent
from altgrad.hyper.inner import Found, Inner, minimise
from altgrad.hyper.replay import replay
from altgrad.hyper.task import Task

__all__ = ["Descent", "Found", "Inner", "Task", "minimise", "replay"]
