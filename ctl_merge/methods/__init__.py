"""Merge methods: pure functions of stacked tensors, in a table.

To add one, add a file with a function decorated by `merge_method`, and name it in `builtin.py`.
"""

from ctl_merge.methods.parameters import Parameter, PerModel
from ctl_merge.methods.registry import Measure, Method, merge_method, registry

__all__ = ["Measure", "Method", "Parameter", "PerModel", "merge_method", "registry"]
