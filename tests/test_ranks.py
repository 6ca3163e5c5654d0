"""Many processes, one output: whatever their number, order and fate, the bytes are those of one process."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import thread_ranks
import torch
from checkpoints import recipe_text, write_checkpoint
from command import Ctl
from typer.testing import CliRunner

from ctl_merge import identity, merging, parts, processes
from ctl_merge.cli import app
from ctl_merge.errors import CtlMergeError, DeviceError, MismatchError, OutputError
from ctl_merge.measures import Measures
from ctl_merge.merging import Merge
from ctl_merge.processes import ALONE, Ranks, check_launcher, deal, launched
from ctl_merge.recipe_file import parse_recipe
from ctl_merge.sums import total
from ctl_merge.writer import JOURNAL, owned

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SHARDS = "4KB"


def family(folder: Path, models: int = 3, layers: int = 6, width: int = 24) -> list[Path]:
    """A base and finetunes near it, bf16, with tensors of many sizes."""
    generator = torch.Generator().manual_seed(5)
    shapes = {
        f"model.layers.{i}.{name}": shape
        for i in range(layers)
        for name, shape in (("q.weight", (width, width)), ("up.weight", (width, 3 * width)), ("norm", (width,)))
    }
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    paths = []
    for model in range(models + 1):
        own = {n: (t + 0.1 * model * torch.randn(t.shape, generator=generator)).bfloat16() for n, t in base.items()}
        paths.append(write_checkpoint(folder / f"model-{model}", own, {"num_hidden_layers": layers}))
    return paths


def text(method: str, models: list[Path], **parameters: Any) -> str:
    weight = {} if method in ("metagpt", "sce", "tsv", "localize_and_stitch", "pcb") else {"weight": 0.4}
    return recipe_text(method, [(path, weight) for path in models[1:]], models[0], parameters)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def alone(recipe: str, output: Path, shards: str = SHARDS) -> dict[str, bytes]:
    return contents(Merge(parse_recipe(recipe), max_shard_size=shards, num_workers=2).write(output).folder)


def together(recipe: str, output: Path, count: int, **options: Any) -> list[Any]:
    def work(ranks: Ranks) -> Any:
        opened = Merge(parse_recipe(recipe), max_shard_size=SHARDS, num_workers=1)
        return opened.write(output, ranks=ranks, **options)

    return thread_ranks.run(count, work)


# ---- what is shared, and how


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_every_shard_has_one_owner_and_the_load_is_even(count: int) -> None:
    sizes = [random.Random(i).randint(1, 100) for i in range(40)]
    owners = deal(sizes, count)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(count)]
    assert sum(loads) == sum(sizes) and set(owners) <= set(range(count))
    assert max(loads) - min(loads) <= max(sizes)
    assert deal(sizes, count) == owners


def test_states_have_the_same_sum_however_many_ranks_add_them_up() -> None:
    generator = torch.Generator().manual_seed(0)
    rounded = [torch.randn(3, generator=generator, dtype=torch.float64).exp() * 10.0**i for i in range(12)]
    counts = [torch.randint(0, 9, (2, 5), generator=generator) for _ in range(12)]
    in_order = rounded[0].clone()
    for state in rounded[1:]:
        in_order = in_order + state
    for states, expected in ((rounded, in_order), (counts, sum(counts))):
        assert torch.equal(total(((i, s.clone()) for i, s in enumerate(states)), ALONE), expected)
        for count in (2, 5, 20):

            def work(ranks: Ranks, count: int = count, states: list[torch.Tensor] = states) -> torch.Tensor:
                return total(((i, s.clone()) for i, s in enumerate(states) if i % count == ranks.index), ranks)

            assert all(torch.equal(found, expected) for found in thread_ranks.run(count, work))

            def mixed(ranks: Ranks, count: int = count, states: list[torch.Tensor] = states) -> torch.Tensor:
                own = ((i, s.clone()) for i, s in enumerate(states) if i % count == ranks.index)
                return total(((i, s.numpy() if ranks.index % 2 else s) for i, s in own), ranks)

            found = thread_ranks.run(count, mixed)  # where every other rank has compiled loops
            assert all(torch.equal(torch.as_tensor(sum_), expected) for sum_ in found)


METHODS = {
    "task_arithmetic": {},
    "ties, whole model": {"density": 0.4, "trim": "model", "elect": "unweighted", "divide": "count", "rescale": True},
    "metagpt": {},
    "sce": {"select_topk": 0.5},
    "dare_ties": {"density": 0.5},
    "tsv": {},
    "pcb": {},
    "localize_and_stitch": {"sparsity": 0.2},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_write_what_one_process_writes(method: str, count: int, tmp_path: Path) -> None:
    recipe = text(method.partition(",")[0], family(tmp_path), **METHODS[method])
    expected = alone(recipe, tmp_path / "one" / "merged")
    results = together(recipe, tmp_path / "many" / "merged", count)
    assert contents(tmp_path / "many" / "merged") == expected
    assert results[0].manifest == json.loads(expected["merge_manifest.json"])
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["merged"]


def test_a_step_is_measured_by_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = family(tmp_path)
    first = "name: first\n" + text("ties", models[:3], density=0.4, trim="model")
    recipe = f"{first}---\n" + text("ties", [models[0], models[3]], density=0.6, trim="model").replace(
        "models:\n", "models:\n- model: first\n  parameters: {weight: 0.5}\n"
    )
    expected = alone(recipe, tmp_path / "one" / "merged")
    shared: list[int] = []
    real = Measures.take

    def measure(self: Any, each: Any = map, ranks: Ranks = ALONE) -> None:
        shared.append(ranks.count)
        real(self, each, ranks)

    monkeypatch.setattr(Measures, "take", measure)
    together(recipe, tmp_path / "many" / "merged", 2)
    assert shared == [2, 2, 2, 2]
    assert contents(tmp_path / "many" / "merged") == expected


def test_more_ranks_than_shards_leave_some_without_work(tmp_path: Path) -> None:
    recipe = text("task_arithmetic", family(tmp_path, layers=1))
    expected = alone(recipe, tmp_path / "one" / "merged")
    together(recipe, tmp_path / "many" / "merged", 7)
    assert contents(tmp_path / "many" / "merged") == expected


# ---- what goes wrong


def test_all_ranks_say_the_same_of_what_all_find(tmp_path: Path) -> None:
    recipe = text("task_arithmetic", family(tmp_path))
    (tmp_path / "merged").mkdir()
    errors = together(recipe, tmp_path / "merged", 3)
    assert {type(error) for error in errors} == {OutputError} and all(error.agreed for error in errors)
    assert len({str(error) for error in errors}) == 1 and "merged exists" in str(errors[0])


def test_what_one_rank_alone_finds_is_said_with_its_number(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        ranks.together(lambda: None if ranks.index < 2 else _fail())

    def _fail() -> None:
        raise OutputError("no room")

    assert [str(error) for error in thread_ranks.run(3, work)] == ["rank 2: no room"] * 3


def test_ranks_that_plan_different_merges_are_refused(tmp_path: Path) -> None:
    models = family(tmp_path)

    def work(ranks: Ranks) -> Any:
        recipe = parse_recipe(text("task_arithmetic", models, normalize=ranks.index == 1))
        return Merge(recipe, max_shard_size="1MB" if ranks.index == 2 else SHARDS).write(
            tmp_path / "merged", ranks=ranks
        )

    for error in thread_ranks.run(3, work):
        assert isinstance(error, MismatchError)
        assert "rank 1: recipe, plan; rank 2: shards. Give all the same files" in str(error)
    assert not (tmp_path / "merged.partial").exists()


def test_versions_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe(text("task_arithmetic", family(tmp_path)))
    before = Merge(recipe).fingerprint()
    monkeypatch.setattr(identity.np, "__version__", "0.1")
    assert Merge(recipe).fingerprint() != before


def test_a_rank_that_ends_ends_the_run_and_another_number_of_ranks_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = text("ties", family(tmp_path), density=0.4, trim="model")
    expected = alone(recipe, tmp_path / "one" / "merged")
    output = tmp_path / "many" / "merged"
    real = merging.ShardWriter._write_tensor

    def fails(self: Any, name: str, journal: Any, progress: Any) -> None:
        if name == "model.layers.4.q.weight":
            raise OutputError("the disk is gone")
        real(self, name, journal, progress)

    with monkeypatch.context() as patch:
        patch.setattr(merging.ShardWriter, "_write_tensor", fails)
        errors = together(recipe, output, 2)
    assert sorted(str(error) for error in errors) == ["another process of this run has ended", "the disk is gone"]
    assert not output.exists()
    monkeypatch.setattr(merging.MergedCheckpoint, "accumulate", lambda *_, **__: pytest.fail("measured again"))
    results = together(recipe, output, 3, resume=True)
    assert 0 < results[0].resumed_tensors < 18
    assert contents(output) == expected


# ---- without a launcher


def part(recipe: str, output: Path, index: int, count: int, **options: Any) -> int:
    return parts.write_part(Merge(parse_recipe(recipe), max_shard_size=SHARDS), output, index, count, **options)


def finalize(recipe: str, output: Path, **options: Any) -> dict[str, bytes]:
    return contents(parts.finalize(Merge(parse_recipe(recipe), max_shard_size=SHARDS), output, **options).folder)


@pytest.mark.parametrize("method", ["sce", "metagpt", "task_arithmetic"])
def test_parts_in_any_order_make_what_one_process_writes(method: str, tmp_path: Path) -> None:
    recipe = text(method, family(tmp_path))
    expected = alone(recipe, tmp_path / "one" / "merged")
    output = tmp_path / "many" / "merged"
    for index in (3, 0, 2, 1):
        assert part(recipe, output, index, 4) == 0
    assert part(recipe, output, 2, 4) > 0  # the same once more finds its work done
    assert finalize(recipe, output) == expected
    assert [path.name for path in output.parent.iterdir()] == ["merged"]


def test_parts_at_the_same_time_do_not_hinder_each_other(tmp_path: Path) -> None:
    recipe = text("ties", family(tmp_path), density=0.3, trim="model")
    expected = alone(recipe, tmp_path / "one" / "merged")
    output = tmp_path / "many" / "merged"
    found = thread_ranks.run(4, lambda ranks: part(recipe, output, ranks.index, 4))
    assert found == [0, 0, 0, 0]
    assert finalize(recipe, output) == expected


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = text("metagpt", family(tmp_path))
    output = tmp_path / "merged"
    part(recipe, output, 0, 2)
    monkeypatch.setattr(merging.MergedCheckpoint, "accumulate", lambda *_, **__: pytest.fail("measured again"))
    part(recipe, output, 1, 2)
    assert "coefficients: " in finalize(recipe, output)["merge_manifest.json"].decode()


def damage(file: Path, what: str) -> None:
    if what == "a shard is gone":
        file.unlink()
    elif what == "a byte is changed":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif what == "a header is changed":
        data = bytearray(file.read_bytes())
        data[40] ^= 1
        file.write_bytes(data)
    else:
        os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("what", ["a shard is gone", "a byte is changed", "a header is changed", "it is cut off"])
def test_finalize_names_what_is_missing_and_the_command_that_makes_it(what: str, tmp_path: Path) -> None:
    recipe = text("task_arithmetic", family(tmp_path))
    expected = alone(recipe, tmp_path / "one" / "merged")
    output = tmp_path / "many" / "merged"
    for index in range(3):
        part(recipe, output, index, 3)
    opened = Merge(parse_recipe(recipe), max_shard_size=SHARDS)
    count, file = len(opened.shards), opened.shards[1].file
    owner = next(i for i in range(3) if opened.shards[1] in owned(opened.shards, i, 3))
    damage(output.with_name("merged.partial") / file, what)
    command = f"--shard-rank {owner} --shard-world 3"
    with pytest.raises(OutputError, match=rf"1 of {count} shards .*: {file}\. Run .*{command}"):
        finalize(recipe, output)
    assert not output.exists()
    part(recipe, output, owner, 3)
    assert finalize(recipe, output) == expected


def test_finalize_before_any_part_says_so(tmp_path: Path) -> None:
    recipe = text("task_arithmetic", family(tmp_path))
    with pytest.raises(OutputError, match="merged.partial is no unfinished merge"):
        finalize(recipe, tmp_path / "merged")
    part(recipe, tmp_path / "merged", 1, 3)
    with pytest.raises(OutputError, match="with each of 0, 2 as RANK"):
        finalize(recipe, tmp_path / "merged")


def test_parts_of_another_merge_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    models = family(tmp_path)
    output = tmp_path / "merged"
    part(text("task_arithmetic", models), output, 0, 2)
    before = contents(tmp_path / "merged.partial")
    other = text("task_arithmetic", models, normalize=True)
    for attempt in (lambda: part(other, output, 1, 2), lambda: finalize(other, output)):
        with pytest.raises(OutputError, match="is of another recipe, other sources"):
            attempt()
    os.utime(models[1] / "model.safetensors", (1, 1))
    with pytest.raises(OutputError, match="is of another recipe, other sources"):
        part(text("task_arithmetic", models), output, 1, 2)
    assert contents(tmp_path / "merged.partial") == before


def test_an_output_that_exists_is_replaced_by_finalize_alone(tmp_path: Path) -> None:
    models = family(tmp_path)
    output = tmp_path / "merged"
    before = alone(text("task_arithmetic", models), output)
    recipe = text("task_arithmetic", models, normalize=True)
    with pytest.raises(OutputError, match="exists"):
        part(recipe, output, 0, 1)
    part(recipe, output, 0, 1, overwrite=True)
    assert contents(output) == before
    assert finalize(recipe, output, overwrite=True) != before


def test_the_same_rank_does_not_run_twice_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, output = text("task_arithmetic", family(tmp_path)), tmp_path / "merged"
    real = merging.ShardWriter._allocate

    def meanwhile(self: Any, shards: Any) -> None:
        monkeypatch.setattr(merging.ShardWriter, "_allocate", real)
        with pytest.raises(OutputError, match="another process is writing the same shards"):
            part(recipe, output, 0, 2)
        with pytest.raises(OutputError, match="another run is writing"):
            finalize(recipe, output)
        part(recipe, output, 1, 2)
        real(self, shards)

    monkeypatch.setattr(merging.ShardWriter, "_allocate", meanwhile)
    part(recipe, output, 0, 2)
    finalize(recipe, output)


def test_one_process_goes_on_with_what_parts_left(tmp_path: Path) -> None:
    recipe = text("task_arithmetic", family(tmp_path))
    expected = alone(recipe, tmp_path / "one" / "merged")
    output = tmp_path / "many" / "merged"
    part(recipe, output, 1, 3)
    result = Merge(parse_recipe(recipe), max_shard_size=SHARDS).write(output, resume=True)
    assert result.resumed_tensors > 0 and contents(output) == expected


# ---- the command line


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text("ties", family(tmp_path, layers=12, width=48), density=0.4, trim="model", rescale=True))
    return path


def test_the_command_line_writes_parts_and_finalizes(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(app, [*arguments, "-o", str(output), "--max-shard-size", SHARDS])

    assert "processes" in call(str(recipe), "--dry-run", "--shard-world", "2").output
    for rank in ("1", "0"):
        done = call(str(recipe), "--shard-rank", rank, "--shard-world", "2")
        assert done.exit_code == 0 and "ctl-merge finalize RECIPE" in done.output
    done = call("finalize", str(recipe), "--json")
    assert json.loads(done.output)["method"] == "ties"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard-rank", "0"], "go together"),
        (["--shard-world", "2"], "go together"),
        (["--shard-rank", "2", "--shard-world", "2"], "from 0 to 1"),
        (["--shard-rank", "0", "--shard-world", "2", "--probe"], "give it to `ctl-merge finalize`"),
    ],
)
def test_half_said_arguments_are_refused(arguments: list[str], message: str, recipe: Path) -> None:
    done = CliRunner().invoke(app, [str(recipe), *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and message in done.output


def test_a_launcher_that_started_one_process_of_several_is_told_of() -> None:
    accelerate = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
    assert check_launcher(accelerate) is None  # one was asked for
    with pytest.raises(DeviceError, match="use `torchrun"):
        check_launcher({**accelerate, "MASTER_ADDR": "127.0.0.1"})
    assert check_launcher({**accelerate, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}) is None
    assert "--shard-rank" in str(check_launcher({"SLURM_STEP_NUM_TASKS": "4"}))


def test_fewer_processes_than_asked_for_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_started", None)
    import accelerate

    class One:
        num_processes, process_index, local_process_index = 1, 0, 0

    monkeypatch.setattr(accelerate, "PartialState", lambda **_: One)
    with pytest.raises(DeviceError, match="2 processes were asked for and 1 came up"):
        launched({"WORLD_SIZE": "2"})


# ---- real processes


def torchrun(count: int, recipe: Path, output: Path, *options: str) -> list[str]:
    started = [*TORCHRUN, "--nproc_per_node", str(count), "-m", "ctl_merge", str(recipe), "-o", str(output)]
    return [*started, "--max-shard-size", SHARDS, *options]


@pytest.mark.launchers
def test_torchrun_merges_and_only_the_first_rank_speaks(recipe: Path, tmp_path: Path) -> None:
    expected = alone(recipe.read_text(), tmp_path / "one" / "merged")
    done = subprocess.run(torchrun(2, recipe, tmp_path / "many" / "merged"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "many" / "merged") == expected
    assert done.stdout.count("tensors merged") == 1


@pytest.mark.launchers
def test_four_ranks_of_torchrun(recipe: Path, tmp_path: Path) -> None:
    expected = alone(recipe.read_text(), tmp_path / "one" / "merged")
    subprocess.run(torchrun(4, recipe, tmp_path / "many" / "merged"), check=True)
    assert contents(tmp_path / "many" / "merged") == expected


@pytest.mark.launchers
def test_an_error_that_all_ranks_find_is_said_once(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    done = subprocess.run(torchrun(2, recipe, tmp_path / "merged"), capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("merged exists: choose another output") == 1


def two_agents(command: list[str]) -> list[subprocess.Popen[str]]:
    """A `torchrun` command on two nodes, both of which are this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    place = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", meeting, "--local_addr", "127.0.0.1"]
    return [
        subprocess.Popen([*command[:3], *place, "--node_rank", str(node), *command[3:]], text=True) for node in (0, 1)
    ]


@pytest.mark.launchers
def test_two_agents_on_two_nodes(recipe: Path, tmp_path: Path) -> None:
    expected = alone(recipe.read_text(), tmp_path / "one" / "merged")
    agents = two_agents(torchrun(2, recipe, tmp_path / "many" / "merged"))
    assert [agent.wait(timeout=300) for agent in agents] == [0, 0]
    assert contents(tmp_path / "many" / "merged") == expected


QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
ON_TEXTS = f"""\
models:
  - {{model: {QUICKSTART / "cycle"}, data: {QUICKSTART / "README.md"}, parameters: {{weight: 0.5}}}}
  - {{model: {QUICKSTART / "shift"}, data: {QUICKSTART / "tasks.py"}, parameters: {{weight: 0.5}}}}
data: {{sequences: 6, length: 24}}
"""
EXPERTS = f"""\
base_model: {QUICKSTART / "base"}
gate_mode: hidden
experts:
  - {{source_model: {QUICKSTART / "cycle"}, positive_prompts: ["cycle: ab"]}}
  - {{source_model: {QUICKSTART / "shift"}, positive_prompts: ["shift: ab"]}}
"""
STACK = f"""\
merge_method: passthrough
slices:
  - sources: [{{model: {QUICKSTART / "cycle"}, layer_range: [0, 3]}}]
  - sources: [{{model: {QUICKSTART / "shift"}, layer_range: [2, 6]}}]
"""
KINDS = {
    "regmean": ("merge_method: regmean\n" + ON_TEXTS, []),
    "regmean of merged inputs": (f"merge_method: regmean\n{ON_TEXTS}".replace("24}", "24, inputs: merged}"), []),
    "fisher": ("merge_method: fisher\n" + ON_TEXTS, []),
    "lot": (f"merge_method: lot\nbase_model: {QUICKSTART / 'base'}\n{ON_TEXTS}", []),
    "experts": (EXPERTS, []),
    "slices": (STACK, []),
    "a probe": ((QUICKSTART / "ties.yaml").read_text().replace("model: ", f"model: {QUICKSTART}/")
                .replace(": base", f": {QUICKSTART}/base") + "probe: {sequences: 20, length: 32}\n", ["--probe"]),
}  # fmt: skip


@pytest.mark.launchers
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_merged_ranks_write_the_same(kind: str, tmp_path: Path, ctl: Ctl) -> None:
    written, options = KINDS[kind]
    (tmp_path / "recipe.yaml").write_text(written)
    done = ctl(tmp_path / "recipe.yaml", "-o", tmp_path / "one" / "merged", "--max-shard-size", "500KB", *options)
    assert done.code == 0, done.err
    command = torchrun(2, tmp_path / "recipe.yaml", tmp_path / "many" / "merged", *options)
    command[command.index(SHARDS)] = "500KB"
    subprocess.run(command, check=True)
    assert contents(tmp_path / "many" / "merged") == contents(tmp_path / "one" / "merged")


@pytest.mark.launchers
def test_a_probe_by_ranks_speaks_once_and_finds_the_same(tmp_path: Path, ctl: Ctl) -> None:
    arguments = ["probe", str(QUICKSTART / "ties.yaml"), "--sequences", "20", "--length", "32"]
    alone = ctl(*arguments, "-o", tmp_path / "one")
    command = [*TORCHRUN, "--nproc_per_node", "2", "-m", "ctl_merge", *arguments, "-o", str(tmp_path / "many")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.replace("many", "one") == alone.out
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.launchers
def test_an_adapter_and_work_of_one_process_are_refused_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {QUICKSTART / 'base'}\noutput: lora\n"
        f"models: [{{model: {QUICKSTART / 'base'}+{QUICKSTART / 'cycle-lora'}, parameters: {{weight: 1}}}}]\n"
    )
    finalize = [*TORCHRUN, "--nproc_per_node", "2", "-m", "ctl_merge", "finalize", str(recipe)]
    for command, what in (
        (torchrun(2, recipe, tmp_path / "merged"), "an adapter"), (finalize, "`ctl-merge finalize`"),
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode != 0
        assert done.stderr.count(f"error: {what} is the work of one process: run it without a launcher") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.launchers
def test_accelerate_launch_on_the_cpu_is_refused(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "ctl_merge"]
    done = subprocess.run([*command, recipe, "-o", tmp_path / "merged"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "asked for several processes and started one" in done.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.launchers
def test_a_killed_rank_ends_the_run_and_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text("ties", family(tmp_path, layers=24, width=256), density=0.4, trim="model"))
    output = tmp_path / "many" / "merged"
    expected = alone(path.read_text(), tmp_path / "one" / "merged", "200KB")
    command = [argument.replace(SHARDS, "200KB") for argument in torchrun(2, path, output, "--num-workers", "1")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal = output.with_name("merged.partial") / f"{JOURNAL}.1-of-2"
    while not (journal.exists() and journal.read_text().count("\n") > 2):
        assert process.poll() is None
        time.sleep(0.005)
    victim = next(c for c in psutil.Process(process.pid).children() if c.environ().get("RANK") == "1")
    victim.send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0 and "SIGKILL" in said
    assert not output.exists()
    again = [argument.replace(SHARDS, "200KB") for argument in torchrun(3, path, output, "--resume", "--json")]
    done = subprocess.run(again, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["method"] == "ties"
    assert contents(output) == expected


@pytest.mark.launchers
def test_a_rank_killed_on_one_node_ends_both_nodes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text("ties", family(tmp_path, layers=24, width=256), density=0.4, trim="model"))
    output = tmp_path / "many" / "merged"
    expected = alone(path.read_text(), tmp_path / "one" / "merged", "200KB")
    command = [argument.replace(SHARDS, "200KB") for argument in torchrun(1, path, output, "--num-workers", "1")]
    agents = two_agents(command)
    journal = output.with_name("merged.partial") / f"{JOURNAL}.1-of-2"
    while not (journal.exists() and journal.read_text().count("\n") > 2):
        assert all(agent.poll() is None for agent in agents)
        time.sleep(0.005)
    ranks = [child for agent in agents for child in psutil.Process(agent.pid).children()]
    next(child for child in ranks if child.environ().get("RANK") == "1").send_signal(signal.SIGKILL)
    assert all(agent.wait(timeout=120) for agent in agents)
    assert not output.exists()
    opened = Merge(parse_recipe(path.read_text()), max_shard_size="200KB")
    assert opened.write(output, resume=True).resumed_tensors > 0
    assert contents(output) == expected


def test_errors_know_whether_all_raise_them() -> None:
    assert CtlMergeError("x").agreed is False


def test_an_adapter_is_not_written_in_parts(tmp_path: Path) -> None:
    quickstart = Path(__file__).parents[1] / "recipes" / "quickstart"
    recipe = parse_recipe(
        f"merge_method: task_arithmetic\nbase_model: {quickstart / 'base'}\noutput: lora\n"
        f"models: [{{model: {quickstart / 'base'}+{quickstart / 'cycle-lora'}, parameters: {{weight: 1}}}}]\n"
    )
    for attempt in (
        lambda: parts.write_part(Merge(recipe), tmp_path / "merged", 0, 2),
        lambda: parts.finalize(Merge(recipe), tmp_path / "merged"),
    ):
        with pytest.raises(DeviceError, match="an adapter is the work of one process"):
            attempt()
    assert not list(tmp_path.iterdir())
