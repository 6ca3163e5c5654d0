"""A merge of adapters, written as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctl_merge.adapter_card import build_adapter_card, said
from ctl_merge.adapter_files import Held
from ctl_merge.adapter_output import AdapterWriter, Meter, as_records, summarised
from ctl_merge.card import RECIPE, recipe_section
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.front_matter import stated_licence
from ctl_merge.lora_output import LoraOutput
from ctl_merge.manifest import build_manifest, write_manifest
from ctl_merge.output import OutputFolder, disk_errors
from ctl_merge.public_recipe import PublicRecipe
from ctl_merge.workers import pool
from ctl_merge.writer import Shard

if TYPE_CHECKING:
    from ctl_merge.merging import Merge


def write_merged_adapter(
    merge: Merge, lora: LoraOutput, target: OutputFolder, fingerprint: str, *, hash_files: bool, meter: Meter,
    attach: Callable[[Path], str] | None,
) -> dict[str, Any]:  # fmt: skip
    """Fit the merge's change and write it into the folder, which appears whole or not at all; gives the manifest."""
    lora.fetch()
    folder = target.open(fingerprint)
    try:
        with pool(merge.workers) as mapped:
            lora.lazy.measures.take(mapped)
        fit = lora.fit(next(iter(merge.devices.values()), "cpu"))
        writer = AdapterWriter(folder, fit, lora.wanted, lora.targets)
        held, shard = writer.write(merge.workers, meter, lora.belongs_on, lora.base.config)
        with disk_errors(folder):
            manifest = _finish(merge, lora, folder, held, shard, hash_files, attach(folder) if attach else "")
            target.commit()
    finally:
        target.close()
    return manifest


def _finish(
    merge: Merge, lora: LoraOutput, folder: Path, held: Sequence[Held], shard: Shard, hash_files: bool, attached: str
) -> dict[str, Any]:
    """Recipe, manifest and card."""
    recipe = merge.recipe
    public = PublicRecipe.of(recipe, [lora.base.ref, *lora.adapters])
    (folder / RECIPE).write_text(public.text, "utf-8")
    unread: dict = {lora.base.ref: lora.base}
    bases = build_manifest(lora.lazy, unread, public, folder, (), {}, None)["sources"]
    with pool(merge.workers) as mapped:
        manifest = build_manifest(
            lora.lazy, lora.adapters, public, folder, (shard,), merge.devices, mapped if hash_files else None
        )
    specs = [merge.plan.specs[name] for name in lora.touched]
    manifest["tensors"] = {"merged": len(specs), "copied": 0, "parameters": sum(spec.numel for spec in specs)}
    for source in manifest["sources"]:
        source["role"] = f"adapter on {source['adapter_on']}" if "adapter_on" in source else "adapter"
    manifest["sources"] = [*({**base, "role": "base"} for base in bases), *manifest["sources"]]
    manifest["adapter"] = {"summary": summarised(held), "parameters": as_records(held)}
    manifest["decisions"] += said(manifest["adapter"])
    sources: list[FileCheckpoint] = [lora.base, *lora.adapters.values()]
    card = build_adapter_card(
        manifest, lora.base.ref, [stated_licence(source.folder) for source in sources],
        folder.name.removesuffix(".partial"), f"merged from {len(lora.adapters)} adapters by `{recipe.method.name}`",
        ["merge", recipe.method.name], recipe_section(public.text), attached,
    )  # fmt: skip
    (folder / "README.md").write_text(card, "utf-8")
    write_manifest(folder, manifest, [shard])
    return manifest
