"""Loss of model folders on texts, in nats per token, with 95 % intervals over windows.

    python benchmarks/held_out_loss.py --text math=test.jsonl:question,answer --text wiki=test.txt MODEL [MODEL ...]

A text is a file, of which jsonl and json files name the fields that are joined. It is cut into consecutive windows of
exactly `--length` tokens by the first model's tokenizer, without special tokens. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar


def read_text(spec: str) -> tuple[str, str]:
    """The name and the text of `name=path[:field,field]`."""
    name, _, rest = spec.partition("=")
    path, _, fields = rest.partition(":")
    raw = Path(path).read_text("utf-8")
    if not fields:
        return name, raw
    rows = json.loads(raw) if path.endswith(".json") else [json.loads(line) for line in raw.splitlines()]
    return name, "\n\n".join("\n".join(row[field] for field in fields.split(",")) for row in rows)


def windows(text: str, tokenizer, count: int, length: int) -> Tensor:
    """The first `count` windows of `length` tokens: (count, length)."""
    ids = tokenizer(text[: 40 * count * length], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: count * length]).view(-1, length)


@torch.inference_mode()
def losses(folder: Path, ids: Tensor) -> Tensor:
    """Mean next-token loss of each window, in nats: (windows,)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for batch in ids.split(8):
        logits = model(input_ids=batch).logits[:, :-1].transpose(1, 2)
        found.append(torch.nn.functional.cross_entropy(logits, batch[:, 1:], reduction="none").mean(1))
    return torch.cat(found).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=PATH[:FIELDS]")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.models[0])
    texts = dict(read_text(spec) for spec in options.text)
    ids = {name: windows(text, tokenizer, options.windows, options.length) for name, text in texts.items()}
    table = Table(title=f"nats per token ± 95 %, {options.windows} windows of {options.length} tokens")
    for column in ("model", *texts, "mean"):
        table.add_column(column, justify="left" if column == "model" else "right")
    rows = []
    for folder in options.models:
        measured = {name: losses(folder, batch) for name, batch in ids.items()}
        means = {name: float(loss.mean()) for name, loss in measured.items()}
        half = {name: 1.96 * float(loss.std()) / math.sqrt(len(loss)) for name, loss in measured.items()}
        mean = sum(means.values()) / len(means)
        table.add_row(folder.name, *(f"{means[n]:.2f} ± {half[n]:.2f}" for n in texts), f"{mean:.2f}")
        rows.append({"model": folder.name, "loss": means, "half_width_95": half, "mean": mean})
    Console(width=100).print(table)
    print(json.dumps({"benchmark": "held_out_loss", "windows": options.windows, "rows": rows}))


if __name__ == "__main__":
    main()
