"""What a run of the command line gives, for the fixture `ctl`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Ran:
    code: int
    out: str
    err: str


Ctl = Callable[..., Ran]
