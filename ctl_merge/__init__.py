"""Merge Hugging Face checkpoints that share a base model.

A recipe is a lazy checkpoint: `open_merge` gives one whose tensors are merged when they are read, `merge` writes it,
`load_model` runs it, `probe` looks into it.

>>> import ctl_merge
>>> merged = ctl_merge.open_merge("recipes/quickstart/ties.yaml")
>>> merged.read("model.norm.weight").shape
torch.Size([96])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ctl_merge.errors import CtlMergeError as CtlMergeError
    from ctl_merge.evaluating.api import evaluate as evaluate
    from ctl_merge.evaluating.evaluation import Evaluation as Evaluation
    from ctl_merge.extraction import extract_lora as extract_lora
    from ctl_merge.merging import MergeResult as MergeResult
    from ctl_merge.merging import merge as merge
    from ctl_merge.merging import open_merge as open_merge
    from ctl_merge.methods import PerModel as PerModel
    from ctl_merge.methods import merge_method as merge_method
    from ctl_merge.probing.api import load_model as load_model
    from ctl_merge.probing.api import probe as probe
    from ctl_merge.probing.api import probe_merged as probe_merged
    from ctl_merge.probing.api import probe_pair as probe_pair
    from ctl_merge.probing.loaded import observing as observing
    from ctl_merge.probing.report import ProbeReport as ProbeReport
    from ctl_merge.proposal import Proposal as Proposal
    from ctl_merge.recipe import Recipe as Recipe
    from ctl_merge.recipe_file import load_recipe as load_recipe
    from ctl_merge.recipe_file import parse_recipe as parse_recipe
    from ctl_merge.starting import propose_recipe as propose_recipe
    from ctl_merge.tuning.api import tune as tune
    from ctl_merge.tuning.tuned import Tuned as Tuned

_PUBLIC = {
    "CtlMergeError": "errors", "extract_lora": "extraction",
    "MergeResult": "merging", "merge": "merging", "open_merge": "merging",
    "PerModel": "methods", "merge_method": "methods", "Recipe": "recipe", "load_recipe": "recipe_file",
    "parse_recipe": "recipe_file", "load_model": "probing.api", "probe": "probing.api", "ProbeReport": "probing.report",
    "observing": "probing.loaded", "probe_pair": "probing.api", "probe_merged": "probing.api",
    "evaluate": "evaluating.api", "Evaluation": "evaluating.evaluation",
    "tune": "tuning.api", "Tuned": "tuning.tuned",
    "propose_recipe": "starting", "Proposal": "proposal",
}  # fmt: skip
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Public names are resolved when they are used: importing the package loads no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ctl_merge' has no attribute {name!r}")
    return getattr(import_module(f"ctl_merge.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
