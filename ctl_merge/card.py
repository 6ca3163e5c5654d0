"""The model card of a merge: README.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

import ctl_merge
from ctl_merge.markdown import code, escaped, fenced
from ctl_merge.number_policy import device_line, number_lines
from ctl_merge.plan import Plan, parameter_ranges
from ctl_merge.public_recipe import PublicRecipe
from ctl_merge.reference import ModelRef

RECIPE = "ctl_merge_recipe.yaml"


def build_card(
    plan: Plan, manifest: dict[str, Any], licences: dict[ModelRef, str | None], title: str, public: PublicRecipe,
    attached: str = "", results: Sequence[Mapping[str, Any]] = (),
) -> str:  # fmt: skip
    """README.md of the merged model: the Hub's metadata, then text.

    licences: of each source, in the manifest's order; None where it states none. attached: Markdown, as it is.
    results: of evaluations, as the Hub's model-index has them: each with `task`, `dataset` and `metrics`.
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
    if not metadata["base_model"]:
        del metadata["base_model_relation"]  # it says what the relation to base_model is
    licence_note = "" if licence else _licence_note(licences)
    local = [code(f"./{source['model']}") for source in manifest["sources"] if source.get("local")]
    local_note = f"\nOf local folders only the names are told: {', '.join(local)}.\n" if local else ""
    return _front({key: value for key, value in metadata.items() if value}, title, results) + "\n".join(
        [
            f"\n# {escaped(title)}\n",
            f"A merge of models made with ctl-merge {ctl_merge.__version__} by `{plan.method.name}`"
            f"{_paper(plan)}: {_lower(plan.method.summary)}\n",
            "## Models\n",
            *_table(plan, manifest, licences),
            local_note,
            licence_note,
            attached,
            recipe_section(public.text),
            "## How it was made\n",
            *(f"- {escaped(line)}" for line in (*manifest["decisions"], *manifest["warnings"])),
            *(f"- {escaped(line)}" for line in number_lines(manifest["numbers"])),
            f"- {device_line(manifest['devices'])}",
            f"- seed {plan.recipe.seed}; " + ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
            "\n## Make it again\n",
            f"The recipe above is the file `{RECIPE}`; `merge_manifest.json` lists every source with its commit, and "
            "every weight file with its size and, unless it was made with `--no-hash`, its sha256. In a folder with "
            "these files,\n",
            f"```console\n$ pip install ctl-merge=={ctl_merge.__version__}\n$ ctl-merge reproduce .\n```\n",
            "makes the merge again from the same commits and says whether it is the same to the byte"
            + ("; local models are given with `--source NAME=FOLDER`.\n" if local else ".\n"),
        ]
    )


def with_results(card: str, title: str, results: Sequence[Mapping[str, Any]]) -> str:
    """The card with these results of evaluations (as in `build_card`) in its metadata; what else stands there stays.

    Of the results before, those of other data sets or metrics stay too, and the model's name, which is else `title`.
    Raises ValueError where the metadata cannot be read.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK
    from huggingface_hub.repocard_data import model_index_to_eval_results

    block = re.match(REGEX_YAML_BLOCK, card)
    try:
        metadata = (yaml.safe_load(block[2]) if block else None) or {}
        before = metadata.pop("model-index", None) or []
        name, old = model_index_to_eval_results(before) if before else (title, [])
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from None
    return _front(metadata, name, results, old) + (card[block.end() :] if block else f"\n{card}")


def _front(
    metadata: dict[str, Any], title: str, results: Sequence[Mapping[str, Any]], before: Sequence[Any] = ()
) -> str:
    """The card's metadata, with results as the Hub's model-index; KeyError where one lacks what that needs.

    `before`: `EvalResult`s, of which those stay that are of another data set or metric.
    """
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    _, new = model_index_to_eval_results([{"name": title, "results": list(results)}])
    taken = {(result.dataset_name, result.metric_type) for result in new}
    all_of_them = [*(old for old in before if (old.dataset_name, old.metric_type) not in taken), *new]
    if all_of_them:
        metadata = metadata | {"model-index": _filled(eval_results_to_model_index(title, all_of_them))}
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=10**9)}---\n"


def _filled(value: Any) -> Any:
    """Without entries that are None."""
    if isinstance(value, dict):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _paper(plan: Plan) -> str:
    paper = plan.method.paper
    return f" ([arXiv {paper}](https://arxiv.org/abs/{paper}))" if paper else ""


def recipe_section(text: str) -> str:
    """The recipe, as others may read it."""
    return f"## Recipe\n\n{fenced(text, 'yaml')}"


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
        name = code(source["model"], in_table=True)
        if "commit" in source:
            link = f"https://huggingface.co/{source['model']}/tree/{source['commit']}"
            name = f"[{escaped(source['model'])}]({link}) at `{source['commit'][:12]}`"
        models = [r for r in plan.recipe.refs if ref in (r, r.adapter)]  # which the source is, or is the adapter of
        role = _role(plan, models, source["model"] in under)
        if "adapter_on" in source:
            role += f", adapter on {code(source['adapter_on'], in_table=True)}"
        own = (", ".join(parameters[m, n] for m in models if (m, n) in parameters) for n in names)
        lines.append(f"| {name} | {role} |" + "".join(f" {escaped(value)} |" for value in own))
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
