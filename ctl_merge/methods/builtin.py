"""Imports the built-in merge methods, which fills the registry."""

from ctl_merge.methods import (  # noqa: F401
    dare,
    iso,
    karcher,
    linear,
    model_stock,
    multislerp,
    nuslerp,
    passthrough,
    slerp,
    task_arithmetic,
    ties,
    tsv,
    wudi,
)
