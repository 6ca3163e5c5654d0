"""Imports point one way: a module imports only from rows above its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ctl_merge

PACKAGE = Path(ctl_merge.__file__).parent

# The pipeline, stage by stage; the modules of one row do not import each other.
STAGES = {
    "what everything uses": (
        "__init__ bounded deferred errors problems shown sizes time_limit",
        "heartbeat workers",
        "processes",
    ),
    "methods: pure functions of tensors": (
        "methods.fused methods.kernels methods.matrices methods.noise methods.parameters",
        "methods.combine",
        "methods.agreement methods.registry",
        "methods.__init__ methods.angles methods.consensus methods.fisher methods.iso methods.linear methods.nearswap "
        "methods.order methods.passthrough methods.ram methods.regmean "
        "methods.rescale methods.table methods.tsv methods.wudi",
        "methods.arcee_fusion methods.karcher methods.metagpt methods.model_stock methods.multislerp "
        "methods.nuslerp methods.sce methods.slerp methods.sparsify methods.task_arithmetic",
        "methods.breadcrumbs methods.dare methods.della methods.localize_and_stitch methods.pcb methods.ties",
        "methods.knots",
        "methods.builtin",
    ),
    "checkpoints in folders, on the Hub, with an adapter": (
        "adapter_config companions digests factors header hub_client hub_errors layers local_paths mapped markdown "
        "model_config output reference tokenizer",
        "architecture chat_template devices hub_content rates sums tokenizer_files",
        "hub",
        "checkpoint destination stacks together",
        "hub_push low_rank parameter_names stored writer",
        "adapter_changes adapter_targets finished pickled",
        "adapter adapter_files shard_stream",
        "adapter_fit publishing task_vectors",
        "adapter_output",
    ),
    "recipes": (
        "document mixture probing.__init__ probing.rows settings",
        "front_matter",
        "moe_families recipe_tokenizer",
        "recipe_schema",
        "moe_schema recipe recipe_words",
        "json_schema recipe_inputs",
        "recipe_check",
        "recipe_file",
    ),
    "plans: what happens to each tensor": (
        "restacked_config token_rows",
        "correspondence slices source_vocabularies",
        "vocabulary",
        "plan",
        "tying",
    ),
    "models that run, and texts for them": (
        "dispatch probing.forward probing.turns",
        "model probing.data",
        "evidence gates loadable",
        "prefix_evidence",
    ),
    "mixtures of experts": (
        "made moe_words",
        "moe",
    ),
    "merges: read, written, described": (
        "counting inputs measures",
        "compiled definition",
        "identity merged number_policy public_recipe step traits",
        "adapter_card card compatibility estimate lora_output manifest measured",
        "check lora_writing original",
        "summary",
        "finishing",
        "merging",
        "calibrate parts reproduce",
    ),
    "comparisons in weight space": (
        "findings weights",
        "compare_table roles",
        "compare",
    ),
    "proposals: a recipe to begin with": (
        "kinship pedigree probing.parents",
        "family",
        "fitting",
        "proposal",
        "proposal_text",
        "starting",
    ),
    "the probe": (
        "probing.grams probing.intervals probing.lockstep probing.null probing.raster "
        "probing.record probing.schema probing.texts",
        "probing.metrics probing.svg probing.wording",
        "probing.advice probing.alphas probing.depth probing.losses probing.waterfall",
        "probing.repair",
        "probing.coefficients probing.comparisons probing.curves probing.observer probing.patches probing.verdict",
        "probing.blocks probing.costs probing.figures probing.run probing.statistics probing.tables probing.terminal",
        "probing.archive probing.page probing.placement probing.ranks probing.scaling probing.section",
        "probing.report probing.windows",
        "probing.api probing.loaded",
    ),
    "evaluation": (
        "evaluating.__init__ evaluating.batches evaluating.execution evaluating.items evaluating.metrics "
        "evaluating.options",
        "evaluating.measured evaluating.passages evaluating.subjects",
        "evaluating.evaluation evaluating.generation evaluating.likelihood",
        "evaluating.answers evaluating.harness evaluating.results evaluating.table",
        "evaluating.api",
    ),
    "adapters of whole models": ("extraction",),
    "tuning": (
        "tuning.__init__ tuning.closed_form tuning.levels tuning.options tuning.splits tuning.tuned tuning.written",
        "tuning.adjustable",
        "tuning.descent tuning.rivals tuning.study tuning.table",
        "tuning.candidates tuning.search",
        "tuning.api",
    ),
    "the command line": (
        "cli.arguments cli.running cli.terminal",
        "cli.check cli.compare cli.evaluate cli.extract_lora cli.init cli.methods cli.probe cli.push "
        "cli.reproduce cli.schema cli.tune cli.verify",
        "cli.merge",
        "cli.finalize",
        "cli.__init__",
        "__main__",
    ),
}
ROWS = [row.split() for stage in STAGES.values() for row in stage]
# Imports within a function that point down, each the one door to a set that grows.
DOORS = {("stored", "pickled"), ("stored", "adapter"), ("methods.registry", "methods.builtin")}

ROW = {module: number for number, row in enumerate(ROWS) for module in row}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def parent_of(module: str) -> str:
    return f"{module}.__init__" if f"{module}.__init__" in MODULES else module


def imports(path: Path) -> Iterator[str]:
    """The package's own modules that a file imports, at its top or within a function; not those for types alone."""
    pending: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, inner = name.partition(".")
            if package == "ctl_merge":
                inner = inner if parent_of(inner) in MODULES else inner.rpartition(".")[0]
                yield parent_of(inner) if inner else "__init__"


def test_every_module_has_one_row() -> None:
    assert sorted(MODULES) == sorted(module for row in ROWS for module in row)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_rows_above_its_own(module: str) -> None:
    row = ROW.get(module, 0)
    below = {name for name in imports(MODULES[module]) if ROW.get(name, 0) >= row and (module, name) not in DOORS}
    assert not below, f"{module} (row {row}) imports {sorted(below)}"


def test_every_door_is_in_use() -> None:
    assert all(name in imports(MODULES[module]) for module, name in DOORS)


def test_imports_are_found() -> None:
    assert set(imports(MODULES["header"])) == {"errors"}
    assert "methods.__init__" in set(imports(MODULES["recipe"]))
    assert "hub" in set(imports(MODULES["stored"]))  # from ctl_merge import hub
    assert set(imports(MODULES["__init__"])) == set()
