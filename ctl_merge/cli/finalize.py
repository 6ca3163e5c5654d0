"""`ctl-merge finalize RECIPE`: shards of several processes become a folder."""

from __future__ import annotations

from pathlib import Path

from ctl_merge.cli.arguments import (
    DeviceMapOption,
    DeviceOption,
    JsonFlag,
    MaxMemoryOption,
    NoHashFlag,
    OutputOption,
    OverwriteFlag,
    ProbeFlag,
    QuietFlag,
    RecipeArgument,
    RemoteCodeFlag,
    ShardSizeOption,
    VerboseFlag,
    WorkersOption,
    one_device,
    require_recipe,
)
from ctl_merge.cli.merge import probing, show_result
from ctl_merge.cli.terminal import configure, meter, warn
from ctl_merge.processes import ALONE


def finalize(
    recipe: RecipeArgument,
    output: OutputOption = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    max_memory: MaxMemoryOption = None,
    num_workers: WorkersOption = None,
    max_shard_size: ShardSizeOption = "5GB",
    overwrite: OverwriteFlag = False,
    no_hash: NoHashFlag = False,
    probe_too: ProbeFlag = False,
    trust_remote_code: RemoteCodeFlag = False,
    as_json: JsonFlag = False,
    verbose: VerboseFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Check what processes with --shard-rank wrote, and make the folder whole: same options as theirs."""
    configure(verbose, quiet)
    mapped = one_device(device, device_map)
    require_recipe(recipe)
    from ctl_merge import parts
    from ctl_merge.merging import Merge

    opened = Merge(
        recipe, device_map=mapped, max_memory=max_memory, num_workers=num_workers, max_shard_size=max_shard_size
    )
    warn(opened.plan.warnings)
    told, said = meter(quiet), list[str]()
    result = parts.finalize(
        opened, output or Path(recipe.stem), overwrite=overwrite, hash_files=not no_hash, meter=told,
        attach=probing(opened, told, trust_remote_code, ALONE, said) if probe_too else None,
    )  # fmt: skip
    show_result(result, as_json, quiet, said)
