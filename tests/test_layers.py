"""Imports point one way: a module imports only from rows above its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ctl_merge

PACKAGE = Path(ctl_merge.__file__).parent

ROWS = [row.split() for row in (
    "__init__ errors sizes companions model_config compatibility methods.parameters methods.noise methods.combine "
    "probing.grams probing.lockstep probing.texts probing.record probing.raster methods.matrices "
    "probing.intervals probing.schema findings probing.__init__ cli.arguments dispatch",
    "architecture header hub tokenizer document output probing.metrics probing.wording probing.svg reference "
    "methods.registry methods.agreement settings probing.rows probing.turns compare_table adapter_config",
    "depth probing.data probing.depth probing.waterfall probing.alphas probing.losses methods.linear "
    "methods.passthrough methods.angles methods.table methods.tsv methods.iso methods.wudi methods.__init__ "
    "checkpoint chat_template tokenizer_files devices methods.fisher methods.regmean methods.order "
    "methods.rescale probing.advice mixture stacks methods.ram methods.metagpt methods.nearswap methods.consensus "
    "low_rank parameter_names",
    "probing.verdict methods.sparsify probing.curves probing.coefficients probing.patches methods.task_arithmetic "
    "methods.dare methods.slerp methods.nuslerp methods.multislerp methods.karcher methods.model_stock rows "
    "recipe_tokenizer writer model probing.null stored step probing.comparisons made moe_families methods.della "
    "methods.sce methods.arcee_fusion adapter_changes",
    "probing.terminal methods.ties weights probing.figures recipe_schema pickled probing.tables gates "
    "methods.breadcrumbs methods.localize_and_stitch methods.pcb adapter",
    "probing.section methods.builtin probing.observer probing.page moe_schema",
    "recipe schema probing.run probing.blocks probing.costs probing.statistics",
    "source_vocabularies slices check correspondence probing.parents probing.ranks probing.placement "
    "probing.scaling probing.archive",
    "vocabulary probing.report moe_words",
    "plan probing.loaded",
    "merged tying card loadable",
    "estimate manifest moe",
    "summary",
    "merging",
    "roles cli.terminal probing.windows",
    "probing.api compare cli.check cli.methods cli.schema",
    "cli.merge cli.probe cli.compare",
    "cli.__init__",
    "__main__",
)]  # fmt: skip
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
