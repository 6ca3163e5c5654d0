"""The model card of an adapter: README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

import ctl_merge
from ctl_merge.markdown import escaped
from ctl_merge.number_policy import device_line, number_lines
from ctl_merge.reference import ModelRef


def build_adapter_card(
    manifest: Mapping[str, Any], base: ModelRef, licences: Sequence[str | None], title: str, made: str,
    tags: Sequence[str], recipe: str = "", attached: str = "",
) -> str:  # fmt: skip
    """README.md of an adapter: the Hub's metadata, then text.

    `made`: in a sentence, how it came about. `licences`: of all sources, None where one states none. `recipe`: the
    section on how to make it again.
    """
    agreed = set(licences)
    metadata = {
        "base_model": base.repo_id, "base_model_relation": "adapter" if base.repo_id else None,
        "library_name": "peft", "tags": ["lora", "ctl-merge", *tags],
        "license": agreed.pop() if len(agreed) == 1 else None,
    }  # fmt: skip
    front = yaml.safe_dump({k: v for k, v in metadata.items() if v}, sort_keys=False, allow_unicode=True)
    adapter = manifest["adapter"]
    return f"---\n{front}---\n\n" + "\n".join(
        [
            f"# {escaped(title)}\n",
            f"A LoRA adapter of `{base.short}`, {made} with ctl-merge {ctl_merge.__version__}.\n",
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n",
            f'base = AutoModelForCausalLM.from_pretrained("{base.short}")',
            f'model = PeftModel.from_pretrained(base, "{title}")\n```\n',
            "## Made from\n", "| model | role |\n|---|---|", *map(_source, manifest["sources"]),
            "\n## How well it holds the change\n", *(f"- {line}" for line in said(adapter)),
            *_table(adapter["parameters"]), *_losses(adapter.get("losses")), attached, recipe,
            "\n## How it was made\n",
            *(f"- {escaped(line)}" for line in (*manifest["decisions"], *manifest["warnings"])),
            *(f"- {escaped(line)}" for line in number_lines(manifest["numbers"])),
            f"- {device_line(manifest['devices'])}",
            "- " + ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
            "\n`merge_manifest.json` lists every source with its size and, unless it was made with `--no-hash`, its "
            "sha256.\n",
        ]
    )  # fmt: skip


def said(adapter: Mapping[str, Any]) -> list[str]:
    """What an adapter holds and what it does not, in words."""
    whole, low = adapter["summary"], adapter["summary"]["ranks"]
    ranks = f"rank {low[0]}" if low[0] == low[1] else f"ranks {low[0]} to {low[1]}"
    lines = [
        f"{whole['parameters']} parameters of {ranks}: {percent(whole['energy'])} of ‖change‖² kept, relative error "
        f"{whole['error']:.2g}; the worst, {whole['worst']['parameter']}, {percent(whole['worst']['energy'])} and "
        f"{whole['worst']['error']:.2g}"
    ]
    if whole["stored_whole"]:
        lines.append(f"{whole['stored_whole']} parameters stored whole or by rows")
    if whole["tied"]:
        lines.append(
            f"{', '.join(whole['tied'])}: tied to another module, as whose change PEFT holds it too. merge_and_unload "
            "would add it twice: use the adapter unmerged, or merge it with ctl-merge"
        )
    left = adapter.get("left_out", [])
    if left:
        share = sum(own["share"] for own in left)
        named = ", ".join(f"{own['tensor']} ({own['why']})" for own in left[:3])
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        lines.append(f"left out: {len(left)} tensors, {percent(share)} of ‖change‖²: {named}{more}")
    return lines


def percent(share: float) -> str:
    """A share with as many digits as tell it from 0 and from 100 %, up to four."""
    if min(share, 1 - share) < 5e-7:
        return f"{100 * round(share)} %"
    texts = [f"{100 * share:.{digits}f}" for digits in range(1, 5)]
    return f"{next((text for text in texts if float(text) not in (0.0, 100.0)), texts[-1])} %"


def _source(source: Mapping[str, Any]) -> str:
    name = f"`{source['model']}`"
    if "commit" in source:
        link = f"https://huggingface.co/{source['model']}/tree/{source['commit']}"
        name = f"[{source['model']}]({link}) at `{source['commit'][:12]}`"
    return f"| {name} | {source.get('role', 'model')} |"


def _table(parameters: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every parameter, folded away."""
    rows = [
        f"| {own['parameter']} | {own['how']} | {own['rank']} | {percent(own['energy'])} | {own['error']:.2g} |"
        if "rank" in own
        else f"| {own['parameter']} | {own['how']} | | | |"
        for own in parameters
    ]
    head = "| parameter | how | rank | kept of ‖change‖² | relative error |\n|---|---|---|---|---|"
    return ["\n<details><summary>Every parameter</summary>\n", head, *rows, "\n</details>\n"]


def _losses(losses: Mapping[str, Mapping[str, float]] | None) -> list[str]:
    """Mean loss a token of base, model and base with the adapter on each text."""
    if not losses:
        return []
    names = list(next(iter(losses.values())))
    lines = [f"| loss on | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    lines += [f"| {text} | {' | '.join(f'{own[name]:.4f}' for name in names)} |" for text, own in losses.items()]
    return ["\n## Loss\n", *lines]
