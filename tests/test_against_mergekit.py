"""The differential benchmark without mergekit: what it draws, how it reads it, and that it notices what is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import against_mergekit
from differential import report as reporting
from differential.behaviour import probes, seen_by
from differential.cases import Case, generate
from differential.families import Family, make, make_adapted, real_family
from differential.methods import METHODS, REQUIRED
from differential.reasons import REASONS, Reason, explained
from differential.reference import defined, wanted
from differential.resolve import evaluate, resolve
from differential.sampling import sample
from differential.tools import Ours, Outcome
from differential.verdict import SINGLE, judge, round_once

import ctl_merge
from ctl_merge.methods import Parameter, registry

BOTH = [name for name in METHODS if name in registry()]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Family]:
    folder = tmp_path_factory.mktemp("families")
    kinds = [("tied", "float32"), ("tied", "bfloat16"), ("odd", "float16"), ("tied", "mixed")]
    made = [make(folder, shape, dtype) for shape, dtype in kinds]
    return [*made, make(folder, "tied", "bfloat16", vocab=True), make_adapted(folder)]


class Fake:
    """Stands for mergekit: gives what `change` makes of our tensors, the seed being its argument too."""

    name = "mergekit"

    def __init__(self, change: Any = lambda tensors, seed: tensors) -> None:
        self.change = change

    def run(self, text: str, seed: int | None = None, whole: bool = False) -> Outcome:
        random = METHODS[text.split()[1]].random
        found = Ours().run(text.replace("rescale: true", "rescale: l1") if random else text, seed)
        return replace(found, tensors=self.change({n: t.clone() for n, t in found.tensors.items()}, seed))


# ---- the table


def test_every_method_of_mergekit_has_a_row():
    registered = (
        "multislerp nearswap ram ramplus_tl sce linear slerp nuslerp passthrough model_stock arcee_fusion karcher "
        "task_arithmetic ties dare_ties dare_linear breadcrumbs breadcrumbs_ties della della_linear"
    )
    assert set(METHODS) == set(registered.split())


@pytest.mark.parametrize("name", BOTH)
def test_rows_have_the_parameters_that_our_methods_declare(name: str):
    """Name, whose it is, and default."""
    method, spec = registry()[name], METHODS[name]
    for knob, what in spec.knobs.items():
        declared = method.parameters[knob]
        default = REQUIRED if declared.default is Parameter.REQUIRED else declared.default
        assert (what.own, what.default) == (declared.per_model, default), knob


def test_reasons_name_methods():
    assert all(reason.methods <= set(METHODS) for reason in REASONS)


# ---- configurations


def test_the_same_seed_draws_the_same(families: list[Family]):
    first, again, other = (generate("ties", 10, families, seed) for seed in (1, 1, 2))
    assert [c.text() for c in first] == [c.text() for c in again] != [c.text() for c in other]


@pytest.mark.parametrize("name", BOTH)
def test_what_is_drawn_are_recipes(name: str, families: list[Family]):
    for case in generate(name, 30, families, 0):
        ctl_merge.parse_recipe(case.text(), case.name)


def test_every_form_is_drawn(families: list[Family]):
    texts = [case.text() for case in generate("ties", 150, families, 0)]
    forms = (
        "models:",
        "slices:",
        "modules:",
        "filter:",
        "\n      density:\n",
        "tokenizer_source",
        "out_dtype",
        "path:",
    )
    for form in forms:
        assert any(form in text for text in texts), form
    assert any("base" in json.dumps(c.config.get("models")) for c in generate("ties", 50, families, 0))


# ---- the second resolver, by hand


@pytest.mark.parametrize(
    "setting, tensor, place, value",
    [
        (0.3, "x", 0.7, 0.3),
        ([0, 1], "x", 0.25, 0.25),
        ([0.0, 1.0, 0.5], "x", 0.75, 0.75),
        ([0.2, 0.4], "x", 1.0, 0.4),
        ([True, False], "x", 0.9, True),
        ([True, False], "x", 1.0, False),
        ("1e-3", "x", 0.0, 0.001),
        ({"value": 2, "filter": "mlp"}, "layers.0.mlp.up", 0.0, 2),
        ([{"filter": "attn", "value": 1}, {"filter": "*", "value": [2, 4]}], "mlp", 0.5, 3),
    ],
)
def test_settings(setting: Any, tensor: str, place: float, value: Any):
    assert evaluate(setting, tensor, place) == value


def test_slices_are_numbered_anew_and_scopes_have_their_order():
    config = {
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"weight": 0.1, "density": [{"filter": "mlp", "value": 0.5}], "lambda": 2.0},
        "slices": [
            {
                "sources": [
                    {"model": "a", "layer_range": [1, 3], "parameters": {"weight": [0.0, 1.0]}},
                    {"model": "base", "layer_range": [0, 2]},
                ],
                "parameters": {"lambda": {"filter": "mlp", "value": 3.0}},
            },
            {"sources": [{"model": "b", "layer_range": [0, 1]}, {"model": "base", "layer_range": [2, 3]}]},
        ],
    }
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("mlp", "self_attn")]
    jobs = {job.name: job for job in resolve(config, METHODS["ties"], names, 3)}
    assert set(jobs) == set(names)
    second = jobs["model.layers.1.mlp.weight"]
    assert second.base == ("base", "model.layers.1.mlp.weight") and second.inputs == (
        ("a", "model.layers.2.mlp.weight"),
    )
    assert second.own == {"weight": (1.0,), "density": (0.5,)} and second.shared["lambda"] == 3.0
    assert jobs["model.layers.0.self_attn.weight"].own == {"weight": (0.0,), "density": (1.0,)}
    assert jobs["model.layers.0.self_attn.weight"].shared["lambda"] == 2.0
    third = jobs["model.layers.2.mlp.weight"]
    assert third.base == ("base", "model.layers.2.mlp.weight") and third.inputs == (("b", "model.layers.0.mlp.weight"),)
    assert third.own["weight"] == (0.1,)
    assert jobs["lm_head.weight"].inputs == (("b", "lm_head.weight"),)
    assert jobs["model.embed_tokens.weight"].inputs == (("a", "model.embed_tokens.weight"),)
    assert jobs["model.embed_tokens.weight"].own["weight"] == (0.0,)


# ---- ours against the definition


@pytest.mark.parametrize("name", [name for name in BOTH if defined(name)])
def test_ours_is_the_definition(name: str, families: list[Family]):
    for case in generate(name, 4, families, 3):
        result = judge(case, Ours(), None)
        assert not result.failures and result.ours is not None
        assert result.entries > 0 and result.ours.exact > 0.99 and result.ours.largest <= 0.501


def test_rounding_is_torch_s():
    values = np.concatenate([np.random.default_rng(0).normal(size=1000) * 2.0 ** np.arange(-30, 20).repeat(20), [0.0]])
    for name in ("bfloat16", "float16", "float32"):
        rounded = torch.from_numpy(values).to(getattr(torch, name)).double().numpy()
        fits = np.isfinite(rounded)
        assert np.mean(round_once(values, name)[fits] == rounded[fits]) > 0.999


# ---- it notices


def plain(family: Family, method: str = "task_arithmetic", **parameters: Any) -> Case:
    models = [{"model": model, "parameters": {"weight": 0.4137}} for model in ("a", "b")]
    config: Mapping[str, Any] = {"merge_method": method, "base_model": "base", "models": models}
    return Case(method, 0, family, {**config, "parameters": parameters} if parameters else config)


def moved(amount: float) -> Any:
    """One entry of one tensor changed by a share of itself."""

    def change(tensors: dict[str, torch.Tensor], seed: int | None) -> dict[str, torch.Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"][2, 3] *= 1 + amount
        return tensors

    return Fake(change)


def test_equal_results_pass(families: list[Family]):
    result = judge(plain(families[0]), Ours(), Fake())
    assert not result.failures and result.ours == result.theirs == result.single


@pytest.mark.parametrize("amount, said", [(1e-7, ""), (1e-4, "mergekit in float32 is not the definition")])
def test_one_entry_of_mergekit_s_is_seen_beyond_rounding(families: list[Family], amount: float, said: str):
    failures = judge(plain(families[0]), Ours(), moved(amount)).failures
    assert [said in failure for failure in failures] == ([True] if said else [])


def test_one_entry_of_ours_is_seen(families: list[Family]):
    result = judge(plain(families[0]), moved(3e-7), Fake())
    assert ["ctl-merge is not the definition" in f or "ours is further" in f for f in result.failures] == [True] * 3


def test_another_parameter_is_seen(families: list[Family]):
    """The tools read 0.9 where the case says 1.1."""

    class Misread(Fake):
        def run(self, text: str, seed: int | None = None, whole: bool = False) -> Outcome:
            return super().run(text.replace("lambda: 1.1", "lambda: 0.9"), seed)

    case = plain(families[0], **{"lambda": 1.1})
    assert judge(case, Misread(), None).failures and judge(case, Ours(), Misread()).failures


def test_refusals_and_other_tensors_are_failures(families: list[Family]):
    case = plain(families[0])

    def without(tensors: dict, seed: int | None) -> dict:
        return {name: tensor for name, tensor in tensors.items() if "norm" not in name}

    assert "mergekit writes other tensors" in judge(case, Ours(), Fake(without)).failures[0]
    typo = replace(case, config={**case.config, "parameters": {"lamda": 1}})
    assert judge(typo, Ours(), None).failures[0].startswith("ctl-merge refuses")


class Drawn:
    """Configurations of a method with what is wanted of each, which tests go through again and again."""

    def __init__(self, families: list[Family]) -> None:
        self.families = families
        self.found: dict[str, list[tuple[Case, list[Any]]]] = {}

    def of(self, name: str) -> Iterator[tuple[Case, list[Any]]]:
        found = self.found.setdefault(name, [])
        for number, case in enumerate(generate(name, 80, self.families, 0)):
            if number == len(found):
                found.append((case, list(wanted(case))))
            yield found[number]


@pytest.fixture(scope="module")
def drawn(families: list[Family]) -> Drawn:
    return Drawn(families)


DETERMINED = [(reason, name) for reason in REASONS for name in sorted(reason.methods) if not METHODS[name].random]


@pytest.mark.parametrize("reason, name", DETERMINED, ids=lambda value: getattr(value, "text", value))
def test_only_entries_that_a_reason_covers_may_differ(reason: Reason, name: str, families: list[Family], drawn: Drawn):
    """One covered entry, then one that is not, is doubled in what stands for mergekit's result."""
    case, covered, other = next(found for c, tensors in drawn.of(name) if (found := places(c, tensors, reason)))
    told = judge(case, Ours(), doubled(*covered))
    assert not told.failures and told.reasons[reason.text] == 1
    assert "mergekit in float32 is not the definition" in judge(case, Ours(), doubled(*other)).failures[-1]


def places(case: Case, tensors: list[Any], reason: Reason) -> tuple[Case, tuple, tuple] | None:
    """The case with a tensor and entry that this reason alone covers, and with one that none does."""
    covered, other = None, None
    for tensor in tensors:
        masks = dict(explained(case.method, tensor, SINGLE))
        differ = tensor.value != 0
        mine = masks.pop(reason.text) & differ & ~np.any([*masks.values(), np.zeros_like(differ)], axis=0)
        none = ~np.any([*masks.values(), reason.where(tensor, SINGLE)], axis=0) & differ
        covered = covered or ((tensor.job.name, tuple(np.argwhere(mine)[0])) if mine.any() else None)
        other = other or ((tensor.job.name, tuple(np.argwhere(none)[0])) if none.any() else None)
    return (case, covered, other) if covered and other else None


def doubled(name: str, place: tuple[int, ...]) -> Fake:
    def change(tensors: dict[str, torch.Tensor], seed: int | None) -> dict[str, torch.Tensor]:
        tensors[name][place] *= 2
        return tensors

    return Fake(change)


@pytest.mark.parametrize("name", sorted({name for _, name in DETERMINED}))
def test_reasons_leave_enough_to_be_judged(name: str, drawn: Drawn):
    entries = covered = 0
    for tensor in (tensor for _, tensors in islice(drawn.of(name), 25) for tensor in tensors):
        mask = np.any(list(explained(name, tensor, SINGLE).values()), axis=0)
        entries, covered = entries + mask.size, covered + int(mask.sum())
    assert covered < 0.65 * entries


def test_rows_are_compared_by_token():
    rows = torch.arange(6.0).view(3, 2)
    ours = Outcome({"lm_head.weight": rows, "x": rows}, tokens={"a": 0, "b": 1, "c": 2})
    theirs = Outcome({"lm_head.weight": rows[[2, 0, 1]], "x": rows}, tokens={"c": 0, "a": 1, "b": 2})
    placed = theirs.in_order_of(ours)
    assert all(torch.equal(placed.tensors[name], rows) for name in ("lm_head.weight", "x"))
    assert theirs.in_order_of(Outcome({}, tokens={"z": 0})) is theirs


def test_float32_in_place_of_16_bits_is_told(families: list[Family]):
    """Of the methods that are known to do so; of others it is a failure."""

    class Wide(Fake):
        def run(self, text: str, seed: int | None = None, whole: bool = False) -> Outcome:
            return super().run(text.replace("\ndtype: bfloat16", "\ndtype: float32"), seed)

    for name, fails in (("arcee_fusion", False), ("nearswap", True)):
        config = {"merge_method": name, "base_model": "base", "models": [{"model": "b"}], "dtype": "bfloat16"}
        if name == "nearswap":
            config["parameters"] = {"t": 0.001}
        result = judge(Case(name, 0, families[0], config), Ours(), Wide())
        assert (result.widened, bool(result.failures)) == (not fails, fails), result.failures


@pytest.mark.parametrize("density, fails", [(0.4, False), (0.43, True)])
def test_sampling_tells_another_density(families: list[Family], density: float, fails: bool):
    """A tool that keeps another share, on masks of seeds of its own."""

    class Drawn(Fake):
        def run(self, text: str, seed: int | None = None, whole: bool = False) -> Outcome:
            assert seed is not None
            return super().run(text.replace("density: 0.4", f"density: {density}"), seed + 1000)

    runs = list(sample("dare_linear", families, 1, 12, 0, Ours(), Drawn()))
    assert len(runs) == 3 and any(run.failures for run in runs) == fails


# ---- the rest


def test_probes_say_what_we_do(tmp_path: Path):
    found = {probe.what: (seen_by(Ours(), probe)[0], probe.ours) for probe in probes(tmp_path)}
    assert len(found) > 12 and all(seen == said for seen, said in found.values()), found


def test_report(families: list[Family]):
    good, bad = (judge(plain(families[0]), Ours(), tool) for tool in (Fake(), moved(0.1)))
    report = reporting.Report({"task_arithmetic": [good, bad]}, {}, [], absent=["ram"])
    data = json.loads(json.dumps(reporting.as_json(report)))
    assert data["holds"] is False and data["methods"][0]["failed"] == 1 and data["absent"] == ["ram"]
    assert data["methods"][0]["worst"][0] <= 0.501 < data["methods"][0]["worst"][1]
    assert reporting.as_json(reporting.Report({"task_arithmetic": [good]}, {}, []))["holds"] is True


def test_results_of_methods_that_are_run_again_replace_the_earlier_ones(families: list[Family]):
    good, bad = (judge(plain(families[0]), Ours(), tool) for tool in (Fake(), moved(0.1)))
    first = reporting.as_json(reporting.Report({"task_arithmetic": [good, bad], "ties": [good]}, {}, []))
    second = reporting.as_json(reporting.Report({"task_arithmetic": [good]}, {}, []))
    assert reporting.joined({}, first) == first and not first["holds"]
    found = reporting.joined(first, second)
    assert found["holds"] and [(row["method"], row["cases"]) for row in found["methods"]] == [
        ("task_arithmetic", 1),
        ("ties", 1),
    ]
    assert not reporting.joined(second, first)["holds"]


def test_a_family_in_folders(families: list[Family]):
    found = real_family(families[0].folder, "base")
    assert found.tunes == ("a", "b", "c", "d") and found.depth == 3 and found.dtype == "float32"


@pytest.mark.parametrize("arguments", [[], ["--mergekit", "no-such-python"], ["--mergekit", sys.executable]])
def test_without_mergekit_the_script_says_what_to_install(arguments: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["against_mergekit.py", *arguments])
    with pytest.raises(SystemExit, match="install mergekit==0.1.5"):
        against_mergekit.main()
