"""What is evaluated: folders, models on the Hub, recipes' merges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctl_merge.bounded import MOST_CONFIG, parse_bounded, read_bounded
from ctl_merge.checkpoint import Checkpoint
from ctl_merge.errors import CheckpointError, DataError
from ctl_merge.merging import Merge
from ctl_merge.probing.data import load_tokenizer
from ctl_merge.probing.windows import merge_tokenizer
from ctl_merge.recipe import Recipe
from ctl_merge.reference import ModelRef
from ctl_merge.roles import roles
from ctl_merge.stored import open_checkpoint

RECIPE_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Evaluated:
    """A model that is evaluated. `folder`: where it lies, None for a merge that was not written.

    `ends`: the tokens that end what it writes. `parents`: the names of base and parents that a merge is compared with.
    """

    name: str
    checkpoint: Checkpoint
    tokenizer: Any
    folder: Path | None = None
    ends: tuple[int, ...] = ()
    parents: tuple[str, ...] = ()


@dataclass
class Group:
    """Models that run together: one alone, or a merge with its base and parents."""

    models: list[Evaluated] = field(default_factory=list)


def open_groups(
    models: Sequence[str | Path | Recipe | Merge], base: str | None, parents: bool, trust_remote_code: bool
) -> list[Group]:
    """Open everything that is evaluated, from headers; weights are fetched. Raises a CtlMergeError.

    With `parents` each recipe brings its base and parents along.
    """
    groups: list[Group] = []
    taken: dict[str, str] = {}
    for given in models:
        groups.append(_group(given, base, parents, trust_remote_code))
        for model in groups[-1].models:
            where = _origin(model)
            if taken.setdefault(model.name, where) != where:
                raise DataError(f"two different models are called {model.name}: rename the file or folder of one")
    return groups


def _origin(model: Evaluated) -> str:
    """What tells two models of the same name apart."""
    ref = getattr(model.checkpoint, "ref", None)
    return str((ref.folder, ref.repo_id, ref.revision, ref.adapter)) if ref else str(id(model.checkpoint))


def _group(given: str | Path | Recipe | Merge, base: str | None, parents: bool, trust_remote_code: bool) -> Group:
    if not isinstance(given, Recipe | Merge) and not str(given).endswith(RECIPE_SUFFIXES):
        return Group([_stored(str(given), trust_remote_code)])
    opened = given if isinstance(given, Merge) else Merge(_recipe(given))
    opened.fetch()
    tokenizer = merge_tokenizer(opened, trust_remote_code)
    ends = _ends(opened.checkpoints[opened.recipe.refs[0]].folder, tokenizer)
    name = Path(opened.recipe.name).stem if opened.recipe.name.endswith(RECIPE_SUFFIXES) else opened.recipe.name
    if not parents:
        return Group([Evaluated(name, opened.merged, tokenizer, None, ends)])
    root, own = roles(opened, ModelRef.parse(base) if base else None)
    family = {_short(root.name): root, **own}
    made = [Evaluated(n, checkpoint, tokenizer, None, ends) for n, checkpoint in family.items()]
    return Group([Evaluated(name, opened.merged, tokenizer, None, ends, tuple(family)), *made])


def _recipe(given: str | Path | Recipe) -> str | Path | Recipe:
    if isinstance(given, Recipe) or Path(given).is_file():
        return given
    raise CheckpointError(f"there is no file {str(given)!r}")


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] or name


def _stored(text: str, trust_remote_code: bool) -> Evaluated:
    checkpoint = open_checkpoint(ModelRef.parse(text))
    checkpoint.fetch()
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.name, trust_remote_code)
    folder = checkpoint.ref.folder if checkpoint.ref.adapter is None else None
    name = _short(str(folder)) if folder else _short(text)
    return Evaluated(name, checkpoint, tokenizer, folder, _ends(checkpoint.folder, tokenizer))


def _ends(folder: Path | None, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text: those of generation_config.json, else the tokenizer's."""
    try:
        content = read_bounded(folder / "generation_config.json", MOST_CONFIG) if folder else b"{}"
        stated = parse_bounded(content).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        stated = None
    listed = stated if isinstance(stated, list) else [stated, tokenizer.eos_token_id]
    return tuple(dict.fromkeys(token for token in listed if isinstance(token, int)))
