"""A plan and its cost, to be read."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ctl_merge.adapter import AdaptedCheckpoint
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.estimate import Estimate
from ctl_merge.header import total_bytes
from ctl_merge.made import MadeRef
from ctl_merge.plan import Plan, parameter_ranges
from ctl_merge.reference import ModelRef
from ctl_merge.sizes import format_size
from ctl_merge.writer import Shard, owned


def as_json(
    plan: Plan,
    cost: Estimate,
    checkpoints: dict[ModelRef, FileCheckpoint],
    shards: tuple[Shard, ...],
    devices: dict[str, str],
    processes: int = 1,
) -> dict[str, Any]:
    """The plan as plain data: what `--dry-run --json` prints."""
    shares = [owned(shards, index, processes) for index in range(processes)]
    operations = Counter(tensor.operation for tensor in plan.tensors.values())
    return {
        "method": plan.method.name,
        "models": [_model(ref, checkpoint, plan) for ref, checkpoint in checkpoints.items()],
        "tensors": {
            "merged": operations["merge"], "copied": operations["copy"],
            "parameters": sum(spec.numel for spec in plan.specs.values()),
            "dtypes": dict(Counter(spec.dtype for spec in plan.specs.values())),
        },
        "bytes": {
            "read": cost.read, "download": cost.download, "write": cost.write, "disk": cost.write, "memory": cost.memory
        },
        "passes_before_merging": cost.passes,
        "shards": [{"file": s.file, "tensors": len(s.specs), "bytes": s.nbytes} for s in shards],
        "processes": [{"shards": len(own), "bytes": sum(shard.nbytes for shard in own)} for own in shares],
        "devices": dict(Counter(devices.values())),
        "parameters": parameter_ranges(plan),
        "decisions": list(plan.decisions),
        "warnings": list(plan.warnings),
    }  # fmt: skip


def _model(ref: ModelRef, checkpoint: FileCheckpoint, plan: Plan) -> dict[str, Any]:
    return {
        "model": ref.text,
        "role": _role(ref, plan),
        **_files(checkpoint.base if isinstance(checkpoint, AdaptedCheckpoint) else checkpoint),
        **({"adapter": _adapter(checkpoint)} if isinstance(checkpoint, AdaptedCheckpoint) else {}),
    }


def _files(checkpoint: FileCheckpoint) -> dict[str, Any]:
    return {
        "commit": checkpoint.snapshot.commit if checkpoint.snapshot else None,
        "tensors": len(checkpoint.tensors),
        "bytes": total_bytes(checkpoint.tensors.values()),
        "dtypes": sorted({spec.dtype for spec in checkpoint.tensors.values()}),
    }


def _role(ref: ModelRef, plan: Plan) -> str:
    if plan.recipe.mixture is not None and ref != plan.recipe.base:
        return "made" if isinstance(ref, MadeRef) else "expert"
    return "base" if ref == plan.recipe.base else "step" if ref.step else "model"


_WITHOUT_FILES = {"step": "merged here", "made": "computed here"}


def _adapter(checkpoint: AdaptedCheckpoint) -> dict[str, Any]:
    """An adapter's own files, and the model that they are applied to."""
    return {"model": checkpoint.adapter.ref.text, "on": checkpoint.base.ref.text, **_files(checkpoint.adapter)}


def render(data: dict[str, Any]) -> Any:
    """What `as_json` gives, as tables for the terminal (at most 100 columns)."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    models = Table(title=f"{data['method']}: what goes in", title_justify="left", title_style="bold")
    for column in ("model", "role", "commit", "tensors", "size", "dtype"):
        models.add_column(column, justify="right" if column in ("tensors", "size") else "left", overflow="fold")
    for model in data["models"]:
        adapter = model.get("adapter")
        _add_row(models, adapter["on"] if adapter else model["model"], model["role"], model)
        if adapter:
            _add_row(models, f"+{adapter['model']}", "adapter", adapter)
    cost = Table(show_header=False, box=None)
    for label, text in _cost_lines(data):
        cost.add_row(label, Text(text))
    notes = [Text(f"· {line}") for line in data["decisions"]] + [Text(f"! {w}", "yellow") for w in data["warnings"]]
    return Group(models, Text(), cost, Text(), *notes)


def _add_row(table: Any, name: str, role: str, files: dict[str, Any]) -> None:
    from rich.text import Text

    commit = (files["commit"] or "")[:12] or _WITHOUT_FILES.get(role, "local folder")
    # No markup: folders may have brackets in their names.
    size = format_size(files["bytes"])
    table.add_row(Text(name), role, commit, f"{files['tensors']:,}", size, " ".join(files["dtypes"]))


def _cost_lines(data: dict[str, Any]) -> list[tuple[str, str]]:
    sizes, tensors = {key: format_size(value) for key, value in data["bytes"].items()}, data["tensors"]
    shards = data["shards"]
    files = shards[0]["file"] if len(shards) == 1 else f"{len(shards)} shards, the largest {_largest(shards)}"
    passes = f", in {1 + data['passes_before_merging']} passes" if data["passes_before_merging"] else ""
    devices = ", ".join(f"{count:,} on {device}" for device, count in data["devices"].items())
    parameters = ", ".join(f"{name} {_shown(value)}" for name, value in data["parameters"].items() if value is not None)
    return [
        ("parameters", parameters or "none"),
        (
            "tensors",
            f"{tensors['merged']:,} merged, {tensors['copied']:,} copied; {tensors['parameters']:,} parameters",
        ),
        ("read", sizes["read"] + passes),
        ("download", sizes["download"]),
        ("write", f"{sizes['write']} ({files})"),
        *([("processes", _processes_line(data["processes"]))] if len(data["processes"]) > 1 else []),
        ("memory", f"at most {sizes['memory']}{' each' if len(data['processes']) > 1 else ''}"),
        ("arithmetic", devices),
        *(_time_lines(data["time"]) if "time" in data else []),
    ]


def _time_lines(time: dict[str, Any]) -> list[tuple[str, str]]:
    """A prediction in words, and what it rests on."""
    parts = ", ".join(f"{name} {_duration(value)}" for name, value in time["parts"].items() if value >= 0.05)
    rates = {name: f"{format_size(rate)}/s" for name, rate in time["bytes_per_second"].items() if rate}
    cached = f"{time['cached']:.0%} of what is read is in the kernel's cache"
    without = f"; without {' and '.join(time['notes'])}" if time["notes"] else ""
    measured = ", ".join(f"{name.replace('_', ' ')} {rate}" for name, rate in rates.items())
    return [
        ("time", f"about {_duration(time['seconds'])} in one process ({parts}){without}"),
        ("measured", f"in {_duration(time['calibrated_in'])}, {time['workers']} workers: {measured}; {cached}"),
    ]


def _duration(seconds: float) -> str:
    """`3 h 20 min`, `5 min 10 s`, `4.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _processes_line(shares: list[dict[str, int]]) -> str:
    """How evenly the shards are shared."""
    sizes = [share["bytes"] for share in shares]
    idle = sizes.count(0)
    return (
        f"{len(shares)}, which write {format_size(min(sizes))} to {format_size(max(sizes))} each"
        + f"; {idle} have none: a smaller --max-shard-size gives each one a share" * bool(idle)
    )


def _shown(value: Any) -> str:
    """As a recipe would have it."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _largest(shards: list[dict[str, Any]]) -> str:
    return format_size(max(shard["bytes"] for shard in shards))
