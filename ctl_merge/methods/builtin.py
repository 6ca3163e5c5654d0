"""Imports the built-in merge methods, which fills the registry."""

from ctl_merge.methods import (  # noqa: F401
    arcee_fusion,
    breadcrumbs,
    consensus,
    dare,
    della,
    linear,
    localize_and_stitch,
    metagpt,
    nearswap,
    passthrough,
    pcb,
    ram,
    sce,
    slerp,
    task_arithmetic,
    ties,
)
