"""What verbs say: messages, progress bars, tables, JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ctl_merge.shown import inert, inert_json, shown

WIDTH = 100  # columns beyond which a table is no easier to read
# what a bar counts; elsewhere tensors
_UNITS = {"merging": "B", "checking": "B", "verifying": "B", "probing": "sequence"}

Meter = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


def configure(verbose: bool = False, quiet: bool = False) -> None:
    """Send the package's messages to standard error; those of libraries only where they are errors."""
    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    others = logging.StreamHandler()
    others.setLevel(logging.ERROR)  # a library's loggers may let more through than the root's own level
    logging.basicConfig(handlers=[others], level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    logger = logging.getLogger("ctl_merge")
    logger.setLevel(level)
    handler = logging.StreamHandler()
    handler.setFormatter(_Shown("%(message)s" if verbose else "%(levelname)s: %(message)s"))
    logger.handlers = [handler]  # the command line may run twice in one process, as it does in tests
    logger.propagate = False
    if quiet or not sys.stderr.isatty():
        _silence_hub()


class _Shown(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def _silence_hub() -> None:
    """No bars and warnings of huggingface_hub's own, without importing it if nothing else does."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_VERBOSITY"] = "error"
    if loaded := sys.modules.get("huggingface_hub.utils"):
        loaded.disable_progress_bars()


def warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        logging.getLogger("ctl_merge").warning(warning)


def meter(quiet: bool = False) -> Meter:
    """A progress bar on standard error where that is a terminal; elsewhere nothing is shown."""
    from ctl_merge.merging import no_meter

    return no_meter if quiet or not sys.stderr.isatty() else _bar


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    unit = _UNITS.get(what, "tensor")
    with tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", dynamic_ncols=True, file=sys.stderr) as bar:
        yield bar.update


def say(text: object, error: bool = False) -> None:
    """Print a line as it is, to standard output or error, but for what a terminal would obey."""
    print(shown(str(text)), file=sys.stderr if error else sys.stdout)


def print_json(data: Any) -> None:
    print_document(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def print_document(text: str) -> None:
    """Print a JSON document; names in it keep their value, and are escaped where a terminal would obey them."""
    print(inert_json(text.removesuffix("\n")))


def print_text(text: str) -> None:
    """Print a line, broken between words."""
    from rich.text import Text

    print_table(Text(shown(text)))


def print_table(what: Any) -> None:
    """Print what rich renders, in at most WIDTH columns: brackets in names are no markup, controls are written out."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False, markup=False, emoji=False)
    console.width = min(console.width, WIDTH)
    console.print(_Inert(what))


class _Inert:
    """What rich renders, with the text of every cell made inert: no table need see to it."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.segment import Segment

        for segment in console.render(self.what, options):
            yield segment if segment.control else Segment(inert(segment.text), segment.style)


def print_sections(sections: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Print lists under titles."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for title, lines in sections:
        listed = Table.grid(padding=(0, 1), pad_edge=True)
        for line in lines:
            listed.add_row("·", Text(shown(line)))
        parts += [Text(shown(title), "bold"), listed]
    print_table(Group(*parts))
