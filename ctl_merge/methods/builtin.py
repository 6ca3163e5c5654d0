"""Imports the built-in merge methods, which fills the registry."""

from ctl_merge.methods import dare, linear, passthrough, slerp, task_arithmetic, ties  # noqa: F401
