"""The generated parts of README.md: `python tests/readme.py` writes them anew, tests/test_readme.py checks them."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ctl_merge import compatibility
from ctl_merge.methods import registry
from ctl_merge.methods.table import as_rows, markdown

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
sys.path.insert(0, str(ROOT / "benchmarks"))
import tune_figure  # noqa: E402

# The order of the tree: the way that weights take. A module that is not here stands at the end, and a test fails.
ORDER = """
    recipe recipe_file recipe_check recipe_inputs recipe_words recipe_schema recipe_tokenizer mixture moe_schema
    reference settings document problems json_schema traits compatibility check
    starting family pedigree kinship fitting proposal proposal_text
    checkpoint header hub hub_content hub_client hub_errors digests stored mapped pickled adapter adapter_config
    adapter_changes low_rank task_vectors step
    layers architecture parameter_names stacks roles
    plan correspondence slices restacked_config tying vocabulary source_vocabularies tokenizer token_rows
    moe moe_families moe_words gates made
    model_config chat_template loadable estimate calibrate rates summary
    methods/ merged inputs definition measures compiled counting devices evidence prefix_evidence
    merging finishing parts processes heartbeat identity measured sums writer workers output together companions
    tokenizer_files manifest number_policy public_recipe local_paths card front_matter markdown bounded sizes shown
    time_limit deferred
    publishing finished shard_stream destination hub_push original reproduce
    factors adapter_targets adapter_fit adapter_files adapter_output lora_output lora_writing adapter_card extraction
    model dispatch compare weights findings compare_table probing/ evaluating/ tuning/
    cli/ errors
""".split()
METHODS = """
    parameters registry builtin table combine order matrices angles noise sparsify rescale agreement fused kernels
""".split()
PROBING = """
    rows texts turns data windows placement forward lockstep run observer grams patches null scaling ranks loaded
    parents
    metrics intervals blocks losses costs record statistics archive schema report api
    wording verdict advice terminal section page tables svg raster depth curves coefficients comparisons waterfall
    alphas repair figures
""".split()
EVALUATING = """
    options subjects passages batches likelihood items generation execution answers metrics measured evaluation table
    results harness api
""".split()
TUNING = """
    options splits levels adjustable closed_form descent candidates study search rivals written tuned table api
""".split()
CLI = """
    arguments running terminal init merge finalize push verify reproduce probe evaluate tune compare check extract_lora
    methods schema
""".split()
WITHIN = {"": ORDER, "methods": METHODS, "probing": PROBING, "evaluating": EVALUATING, "tuning": TUNING, "cli": CLI}


def modules(folder: str = "") -> list[str]:
    """The modules of a folder of the package, and its folders with a slash, by name."""
    here = ROOT / "ctl_merge" / folder
    found = [path.stem for path in here.glob("[!_]*.py")]
    return sorted([*found, *(f"{path.parent.name}/" for path in here.glob("*/__init__.py"))])


def tree() -> str:
    """Every module with the first line of its docstring."""
    lines = list(_branch("", 4))
    width = max(len(name) for name, _ in lines) + 1
    return "```\nctl_merge/\n" + "\n".join(f"{name:<{width}}{text}" for name, text in lines) + "\n```"


def _branch(folder: str, indent: int) -> Iterator[tuple[str, str]]:
    order = {name: place for place, name in enumerate(WITHIN[folder])}
    for name in sorted(modules(folder), key=lambda name: (order.get(name, len(order)), name)):
        path = ROOT / "ctl_merge" / folder / name
        yield (
            " " * indent + (name if name.endswith("/") else f"{name}.py"),
            _first_line(path / "__init__.py" if name.endswith("/") else path.with_suffix(".py")),
        )
        if name.endswith("/"):
            yield from _branch(name[:-1], indent + 2)


def recipes() -> str:
    """The recipes that ship, each with the first line of its comment."""
    found = sorted((ROOT / "recipes").glob("**/*.yaml"))
    return "\n".join(f"- [{p.relative_to(ROOT)}]({p.relative_to(ROOT)}): {_comment(p)}" for p in found)


def against() -> str:
    """What the differential benchmark found, a row for each method of mergekit's."""
    found = json.loads((ROOT / "benchmarks/results/against_mergekit.json").read_text("utf-8"))
    lines = [
        "| method | cases | rounded once, %: ours · mergekit · in float32 | worst error: ours · mergekit in float32 "
        "| by rule, % |",
        "|---|---|---|---|---|",
    ]
    for row in found["methods"]:
        exact = " · ".join(f"{100 * share:.2f}" for share in row["exact"] if share is not None)
        worst = " · ".join(f"{error:.2g}" for error in row["worst"][::2] if error is not None)
        if row["method"] in found["sampled"]:
            worst += " · the same distribution"
        lines.append(f"| `{row['method']}` | {row['cases']} | {exact} | {worst} | {_share(row, found['reasons'])} |")
    return "\n".join(lines)


def _share(row: Mapping[str, Any], reasons: Mapping[str, int]) -> str:
    """The share of entries in which mergekit differs for a reason, in percent."""
    count = sum(n for text, n in reasons.items() if text.startswith(f"{row['method']}:"))
    return f"{100 * count / row['entries']:.2g}" if count else ""


def tuning() -> str:
    """The table of the experiment on tuning, from its results."""
    rows = json.loads((ROOT / "benchmarks/results/tune_against_uniform.json").read_text("utf-8"))["rows"]
    return tune_figure.markdown(rows)


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return text.partition("\n")[0]


def _comment(path: Path) -> str:
    return path.read_text("utf-8").partition("\n")[0].lstrip("# ").rstrip()


def generated() -> str:
    """README.md as it should be."""
    text = README.read_text("utf-8")
    for name, content in (
        ("methods", markdown(as_rows(registry().values()))),
        ("compatibility", compatibility.markdown(compatibility.ROWS)),
        ("against", against()),
        ("tree", tree()),
        ("recipes", recipes()),
        ("tuning", tuning()),
    ):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)  # noqa: B023
    return text


if __name__ == "__main__":
    README.write_text(generated(), "utf-8")
