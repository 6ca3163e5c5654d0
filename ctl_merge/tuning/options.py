"""How a merge is tuned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ctl_merge.evaluating.options import TextOptions


@dataclass(frozen=True)
class TuneOptions(TextOptions):
    """How a merge is tuned; `sequences`, `length`, `batch` and the device as for a probe.

    Of the windows of each data set three eighths tune, an eighth validates, and half, which tuning never sees, compare;
    with held-out data of their own three quarters tune and one validates. `seed` turns the windows round before they
    are split. `level`: what shares a coefficient (see LEVELS). `steps` of descent, 0 for none.
    `least`, `most`: between which coefficients stay; that one lies far outside is a sign
    of data that are not what the models were made for. `trials` of a search, whose `study` is a file that it goes on
    with. `probe`: look at the merge before and after, for a report.
    """

    seed: int = 0
    level: str = "tensor"
    steps: int = 10
    least: float = 0.0
    most: float = 2.0
    closed_form: bool = True
    trials: int = 0
    study: Path | None = None
    probe: bool = False
