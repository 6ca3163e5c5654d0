"""Measure exact match by greedy generation of any model folders on the quickstart tasks.

    python recipes/quickstart/exact_match.py DIR [DIR ...] [--count N] [--json]

A folder is a checkpoint saved with ``save_pretrained``, or a LoRA adapter whose base is a sibling folder.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tasks import MAX_LETTERS, TASKS, Task, examples
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

EVALUATION_SEED = 31_337  # other items than those on which the recipes' parameters were chosen (seed 20,000)
BATCH = 256
# An answer is a space, at most two letters per letter of the word (the base task "double") and the end mark.
NEW_TOKENS = 2 * MAX_LETTERS + 2


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint folder, or a LoRA adapter folder merged into its base, in float32 for evaluation."""
    adapter = folder / "adapter_config.json"
    source: Path | str = folder
    if adapter.exists():
        name = json.loads(adapter.read_text())["base_model_name_or_path"]
        sibling = folder.resolve().parent / name
        source = sibling if sibling.is_dir() else name
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if adapter.exists():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    return model.eval(), tokenizer


@torch.inference_mode()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Generate the greedy continuation of each prompt, up to the end mark."""
    found: list[str] = []
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer(prompts[start : start + BATCH], return_tensors="pt", padding=True, padding_side="left")
        batch = batch.to(model.device)
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        found += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, count: int) -> float:
    """Return the share, from 0 to 1, of `count` held-out items of `task` that the model answers exactly."""
    items = examples(task, "held-out", count, EVALUATION_SEED)
    found = answers(model, tokenizer, [item.prompt for item in items])
    return sum(got == item.answer for got, item in zip(found, items, strict=True)) / count


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval, from 0 to 1, of a share out of `count`; z = 1.96 gives 95 %."""
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def measure(folder: Path, tasks: dict[str, Task], count: int) -> dict[str, Any]:
    """Measure one folder on all `tasks`: the exact match and its 95 % interval per task, and the mean."""
    model, tokenizer = load(folder)
    scores = {name: exact_match(model, tokenizer, task, count) for name, task in tasks.items()}
    return {
        "model": folder.resolve().name,
        "items": count,
        "exact_match": scores,
        "interval_95": {name: wilson_interval(score, count) for name, score in scores.items()},
        "mean": sum(scores.values()) / len(scores),
    }


def table(results: list[dict[str, Any]], count: int) -> Table:
    """Lay out the results as a model x task table in percent, with 95 % Wilson intervals in brackets."""
    names = list(results[0]["exact_match"])
    layout = Table(title=f"exact match on {count} held-out items per task, % [95 % interval]")
    layout.add_column("model", overflow="fold")
    for name in [*names, "mean"]:
        layout.add_column(name, justify="right")
    for result in results:
        cells = []
        for name in names:
            low, high = result["interval_95"][name]
            cells.append(f"{100 * result['exact_match'][name]:.1f} \\[{100 * low:.1f}, {100 * high:.1f}]")
        layout.add_row(result["model"], *cells, f"{100 * result['mean']:.1f}")
    return layout


def main() -> None:
    """Measure the folders named on the command line and print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description="Exact match of model folders on the quickstart tasks.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--count", type=int, default=400, help="held-out items per task (default: 400)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = [measure(folder, TASKS, arguments.count) for folder in arguments.folders]
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        Console(width=min(100, Console().width)).print(table(results, arguments.count))


if __name__ == "__main__":
    main()
