"""The probe's figures: which there are, and their files."""

from __future__ import annotations

import re
from pathlib import Path

from ctl_merge.probing.alphas import sweep_figure
from ctl_merge.probing.coefficients import coefficient_figure
from ctl_merge.probing.comparisons import parts_figure, recipe_figure, scaling_figure, strata_figure
from ctl_merge.probing.curves import cosine_figure, nonlinearity_figure, origin_figure
from ctl_merge.probing.patches import blame_figure, patch_figure
from ctl_merge.probing.raster import png
from ctl_merge.probing.record import Data, prepared
from ctl_merge.probing.repair import repair_figures
from ctl_merge.probing.svg import COLOURS, Figure
from ctl_merge.probing.waterfall import loss_figure

_DRAWN = (
    nonlinearity_figure, recipe_figure, cosine_figure, origin_figure, parts_figure, strata_figure, coefficient_figure,
    scaling_figure, blame_figure, patch_figure, loss_figure, sweep_figure,
)  # fmt: skip
_NAMES = (
    "held_out", "tuned_coefficients", "nonlinearity", "recipes", "cosine", "origin", "parts", "strata", "coefficients",
    "scaling", "blame", "patch", "losses", "sweep",
)  # fmt: skip
FILES = tuple(f"{name}.{kind}" for name in _NAMES for kind in ("svg", "png"))  # all that a report may have


def figures(data: Data) -> list[Figure]:
    """The figures that the data can fill."""
    data = prepared(data)
    made = [*repair_figures(data), *(draw(data) for draw in _DRAWN)]
    return [figure for figure in made if figure]


def write_figures(data: Data, folder: Path) -> list[Path]:
    """Write each figure as an .svg that stands alone and, where the extra `figures` is installed, a .png beside it.

    Both have an opaque, light background, so that they can be read on any page. Returns the paths of what is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures(data):
        svg = standing_alone(figure.svg)
        paths.append(folder / f"{figure.name}.svg")
        paths[-1].write_text(svg + "\n", "utf-8")
        if picture := png(svg):
            paths.append(folder / f"{figure.name}.png")
            paths[-1].write_bytes(picture)
    return paths


def standing_alone(svg: str, theme: int = 0) -> str:
    """The element with a background and the colours of a theme (0: light, 1: dark), for where no page sets them."""
    svg = re.sub(r'"var\(--(\w+)\)"', lambda found: f'"{COLOURS[found[1]][theme]}"', svg)
    return svg.replace(">", f'><rect width="100%" height="100%" fill="{COLOURS["paper"][theme]}"/>', 1)
