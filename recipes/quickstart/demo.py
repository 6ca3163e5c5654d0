"""The demo: merge the models in this folder by each recipe beside it, and measure every model on every task.

    python recipes/quickstart/demo.py [--output FOLDER] [--count ITEMS]

Takes about a minute on two cores. What it makes lies in `demo-output`.
"""

import argparse
import logging
import os
import shutil
from pathlib import Path

import torch
from exact_match import measure, table
from rich.console import Console
from tasks import TASKS
from transformers.utils.logging import disable_progress_bar

import ctl_merge

HERE = Path(__file__).parent


def merge_all(output: Path, console: Console) -> list[Path]:
    """Merge by every recipe in this folder, each into a folder of its name."""
    folders = []
    for recipe in sorted(HERE.glob("*.yaml")):
        folder = output / recipe.stem
        console.print(f"$ ctl-merge {os.path.relpath(recipe)} -o {folder}", style="bold")
        result = ctl_merge.merge(recipe, folder)
        merged = result.manifest["tensors"]
        console.print(f"  {merged['merged']} tensors, {merged['parameters']:,} parameters → {folder}")
        folders.append(folder)
    return folders


def main() -> None:
    """Merge, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the merged models")
    parser.add_argument("--count", type=int, default=400, help="held-out items per task (default: 400)")
    options = parser.parse_args()
    logging.getLogger("ctl_merge").setLevel(logging.ERROR)
    disable_progress_bar()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    console = Console(width=min(100, Console().width), highlight=False)
    shutil.rmtree(options.output, ignore_errors=True)
    merged = merge_all(options.output, console)
    parents = [HERE / name for name in ("base", *TASKS)]
    console.print("measuring …")
    results = [measure(folder, TASKS, options.count) for folder in (*parents, *merged)]
    console.print(table(results, options.count))
    console.print(f"The merged models are in {options.output}: each a folder that transformers loads.")


if __name__ == "__main__":
    main()
