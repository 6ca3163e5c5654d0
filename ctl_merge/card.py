"""The model card of a merge: README.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

import ctl_merge
from ctl_merge.plan import Plan, parameter_ranges
from ctl_merge.reference import ModelRef

RECIPE = "ctl_merge_recipe.yaml"


def build_card(
    plan: Plan, manifest: dict[str, Any], licences: dict[ModelRef, str | None], title: str, attached: str = ""
) -> str:
    """README.md of the merged model: the Hub's metadata, then text.

    `licences`: of each source, in the manifest's order; None where it states none.
    """
    agreed = set(licences.values())
    licence = agreed.pop() if len(agreed) == 1 else None
    metadata: dict[str, Any] = {
        "base_model": list(dict.fromkeys(ref.repo_id for ref in licences if ref.repo_id)),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "ctl-merge", plan.method.name],
        "license": licence,
    }
    front = yaml.safe_dump({k: v for k, v in metadata.items() if v}, sort_keys=False, allow_unicode=True)
    if not metadata["base_model"]:
        front = front.replace("base_model_relation: merge\n", "")  # it says what the relation to base_model is
    licence_note = "" if licence else _licence_note(licences)
    return f"---\n{front}---\n\n" + "\n".join(
        [
            f"# {title}\n",
            f"A merge of models made with ctl-merge {ctl_merge.__version__} by `{plan.method.name}`"
            f"{_paper(plan)}: {_lower(plan.method.summary)}\n",
            "## Models\n",
            *_table(plan, manifest, licences),
            licence_note,
            attached,
            recipe_section(plan.recipe.text),
            "## How it was made\n",
            *(f"- {line}" for line in (*manifest["decisions"], *manifest["warnings"])),
            f"- seed {plan.recipe.seed}; " + ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
            "\n## Make it again\n",
            f"The recipe above is the file `{RECIPE}`. Branches move: for the same sources write the commits of the "
            "table after the names, as in `org/name@commit`; folders are looked for beside the recipe. "
            "`merge_manifest.json` lists every source and weight file with its size and, unless it was made with "
            "`--no-hash`, its sha256.\n",
            f"```console\n$ pip install ctl-merge=={ctl_merge.__version__}\n$ ctl-merge {RECIPE} -o merged\n```\n",
        ]
    )


def _paper(plan: Plan) -> str:
    paper = plan.method.paper
    return f" ([arXiv {paper}](https://arxiv.org/abs/{paper}))" if paper else ""


def recipe_section(text: str) -> str:
    """The recipe verbatim."""
    return f"## Recipe\n\n{_fence(text)}yaml\n{text.rstrip()}\n{_fence(text)}\n"


def _fence(text: str) -> str:
    """Backticks that the text cannot close."""
    fence = "```"
    while fence in text:
        fence += "`"
    return fence


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _licence_note(licences: dict[ModelRef, str | None]) -> str:
    stated = sorted({licence for licence in licences.values() if licence})
    if not stated:
        return "\nThe sources state no licence.\n"
    return f"\nThe sources' licences differ ({', '.join(stated)}, or none stated): see each model.\n"


def _table(plan: Plan, manifest: dict[str, Any], refs: Iterable[ModelRef]) -> list[str]:
    """A Markdown table of the sources: role, name linked to its pinned commit, parameters."""
    names = [name for name, p in plan.method.parameters.items() if p.per_model]
    lines = [f"| model | role |{''.join(f' {name} |' for name in names)}", "|---|---|" + "---|" * len(names)]
    parameters = _described(plan)
    under = {source.get("adapter_on") for source in manifest["sources"]}
    for source, ref in zip(manifest["sources"], refs, strict=True):
        name = f"`{source['model']}`"
        if "commit" in source:
            link = f"https://huggingface.co/{source['model']}/tree/{source['commit']}"
            name = f"[{source['model']}]({link}) at `{source['commit'][:12]}`"
        models = [r for r in plan.recipe.refs if ref in (r, r.adapter)]  # which the source is, or is the adapter of
        role = _role(plan, models, source["model"] in under)
        if "adapter_on" in source:
            role += f", adapter on `{source['adapter_on']}`"
        own = (", ".join(parameters[m, n] for m in models if (m, n) in parameters) for n in names)
        lines.append(f"| {name} | {role} |" + "".join(f" {value} |" for value in own))
    return lines


def _role(plan: Plan, models: list[ModelRef], under: bool) -> str:
    if models:
        return "base" if plan.recipe.base in models else "merged"
    return "under an adapter" if under else "of a step"


def _described(plan: Plan) -> dict[tuple[ModelRef, str], str]:
    """Per-model parameters of each source; those of one that is listed twice side by side."""
    ranges = parameter_ranges(plan)
    found: dict[tuple[ModelRef, str], str] = {}
    for name in (name for name, parameter in plan.method.parameters.items() if parameter.per_model):
        for source, value in zip(plan.recipe.models, ranges[name], strict=False):
            key = (source.ref, name)
            found[key] = f"{found[key]}, {value}" if key in found else str(value)
    return found
