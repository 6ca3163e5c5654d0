"""`ctl-merge init`: the base that is found, how sure it is, what is flagged, and that what is written plans."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from adapters import train
from checkpoints import write_checkpoint
from command import Ctl
from hub_server import HubServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_architectures import build
from torch import Tensor

import ctl_merge
from ctl_merge.errors import CheckpointError, CtlMergeError, MismatchError, OutputError, RecipeError
from ctl_merge.front_matter import stated_bases, stated_licence
from ctl_merge.kinship import Kinship, sample_kinship
from ctl_merge.merging import Merge
from ctl_merge.pedigree import Statement, common_base
from ctl_merge.proposal import Proposal, scale
from ctl_merge.reference import ModelRef
from ctl_merge.starting import propose_recipe, write_recipe
from ctl_merge.stored import open_checkpoint

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart"
FAMILY = ROOT.parent / "shared" / "models"
WEIGHTS = "model.safetensors"


def tensors(rows: int = 32, width: int = 8, blocks: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(rows, width, generator=generator),
        **{
            f"model.layers.{i}.{part}.weight": torch.randn(width, width, generator=generator)
            for i in range(blocks)
            for part in ("q", "k", "v", "o")
        },
        "model.norm.weight": torch.ones(width),
    }


def moved(base: Mapping[str, Tensor], seed: int, size: float = 0.05) -> dict[str, Tensor]:
    """The base and a random task vector of its own."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + size * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}


def model(folder: Path, weights: Mapping[str, Tensor] | None = None, card: str = "", **config: Any) -> Path:
    weights = moved(tensors(), sum(folder.name.encode())) if weights is None else weights
    rows = weights["model.embed_tokens.weight"].shape[0]
    write_checkpoint(folder, weights, {"num_hidden_layers": 2, "vocab_size": rows, **config})
    if card:
        (folder / "README.md").write_text(f"---\n{card}\n---\n# {folder.name}\n")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def base(here: Path) -> Path:
    return model(here / "base", tensors())


def plans(proposal: Proposal, path: Path = Path("recipe.yaml")) -> ctl_merge.Recipe:
    """The recipe as it is found when it is written, planned as `--dry-run` does."""
    write_recipe(proposal, path, overwrite=True)
    opened = Merge(path)
    assert opened.summary()
    return opened.recipe


# ---- what models state


NAMES = {name: name for name in ("a", "b", "c", "mid", "base", "other")}


def line(*parents: str, source: str = "card", firm: bool = True) -> list[Statement]:
    return [Statement(parent, source, firm) for parent in parents]


@pytest.mark.parametrize(
    ("stated", "expected", "confidence"),
    [
        ({}, None, "unknown"),
        ({"a": line("base"), "b": line("base")}, "base", "stated"),
        ({"a": line("mid"), "mid": line("base"), "b": line("base")}, "base", "stated"),
        ({"a": line("mid"), "mid": line("base"), "b": line("mid")}, "mid", "stated"),
        ({"a": line("base", "mid"), "mid": line("base"), "b": line("base")}, "base", "stated"),  # a merge's card
        ({"a": line("base")}, "base", "stated by some"),
        ({"a": line("b")}, "b", "stated"),
        ({"a": line("b"), "b": line("base")}, "b", "stated"),
        ({"a": line("base"), "b": line("base", source="config.json", firm=False)}, "base", "stated by some"),
        ({"a": line("base"), "b": line("other")}, None, "unknown"),
        ({"a": line("b"), "b": line("a")}, "a", "stated"),  # nonsense ends, too
    ],
)
def test_the_nearest_common_ancestor_is_the_base(
    stated: dict[str, list[Statement]], expected: str | None, confidence: str
) -> None:
    found = common_base(["a", "b"], stated, NAMES)
    assert (found.base, found.confidence) == (expected, confidence)
    assert found.reasons


def test_reasons_follow_the_chain() -> None:
    stated = {"a": line("mid"), "mid": line("base", source="config.json"), "b": line("base")}
    found = common_base(["a", "b", "c"], stated, NAMES)
    assert found.reasons == (
        "a: its card names mid, whose config.json names base",
        "b: its card names base",
    )
    assert found.doubts == ("c does not say what it was trained from",)
    apart = common_base(["a", "b"], {"a": line("base"), "b": line("other")}, NAMES)
    assert apart.reasons == ("a: its card names base", "b: its card names other")
    assert apart.doubts == ("what the models state of their origin leads to no common base",)


# ---- what weights tell


def test_inner_products_are_those_of_the_weights(here: Path) -> None:
    weights = [moved(tensors(blocks=1), seed) for seed in range(3)]
    folders = [model(here / str(i), own, num_hidden_layers=1) for i, own in enumerate(weights)]
    found = sample_kinship({str(folder): open_checkpoint(ModelRef.parse(str(folder))) for folder in folders})
    assert found is not None
    matrices = [name for name, tensor in weights[0].items() if tensor.dim() == 2]
    stacked = np.stack([np.concatenate([own[n].double().numpy().ravel() for n in matrices]) for own in weights])
    np.testing.assert_allclose(found.gram, stacked @ stacked.T, rtol=1e-12)
    distance = np.linalg.norm(stacked[1] - stacked[0]) / np.linalg.norm(stacked[0])
    assert found.distance(1, 0) == pytest.approx(distance, rel=1e-9)


def gram(*points: list[float]) -> Kinship:
    rows = np.array(points)
    return Kinship(tuple(map(str, range(len(rows)))), rows @ rows.T)


def test_the_corner_of_right_angles_is_the_base() -> None:
    at, x, y, z = [9.0, 0, 0, 0], [9.0, 1, 0, 0], [9.0, 0, 2, 0], [9.0, 0, 0, 1]
    assert gram(x, at, y).centre() == 1
    assert gram(x, y, z, at).centre() == 3
    assert gram(x, at, y).corner(1) == pytest.approx(0, abs=1e-9)
    assert gram(x, [9.0, 0, 1, 0], z).centre() is None  # three finetunes of a model that is not there
    assert gram(x, [9.0, 0, 1, 0], z).corner(0) == pytest.approx(0.5)
    assert gram(at, x).centre() is None  # of two, either could be the other's base
    assert gram(at, at, x).centre() is None


def test_weights_of_zeros_tell_nothing(here: Path, base: Path) -> None:
    folders = [base, model(here / "a", {name: torch.zeros_like(tensor) for name, tensor in tensors().items()})]
    assert sample_kinship({str(folder): open_checkpoint(ModelRef.parse(str(folder))) for folder in folders}) is None


# ---- base and confidence, on folders


def test_cards_that_name_a_folder_beside_them_make_it_the_base(here: Path, base: Path) -> None:
    for name in ("a", "b"):
        model(here / name, card="base_model: ../base\nlicense: mit")
    found = propose_recipe(["a", "b"])
    recipe = plans(found)
    assert recipe.method.name == "task_arithmetic"
    assert recipe.base and recipe.base.folder == base
    assert found.common.confidence == "stated"
    assert found.common.reasons == ("a: its card names base", "b: its card names base")
    assert found.doubts == ()
    assert found.shared == {"lambda": 0.7}
    assert "# Base: stated by every model that comes from it" in found.text


def test_a_folder_that_is_given_stands_in_for_the_repository_of_its_name(here: Path, base: Path) -> None:
    for name in ("a", "b"):
        model(here / name, card="base_model:\n- some-org/Base")
    found = propose_recipe(["a", "b", "base"])
    assert plans(found).base == ModelRef.parse("base")
    assert [member.name for member in found.models] == ["a", "b"]
    assert "some-org/Base is taken to be the folder base, by its name" in found.doubts
    assert "some-org/Base is taken to be the folder base, by its name" in " ".join(found.text.split())


def test_a_base_that_nobody_states_is_seen_in_the_weights_of_three(here: Path, base: Path) -> None:
    model(here / "a"), model(here / "b")
    found = propose_recipe(["a", "base", "b"])
    assert found.common.confidence == "by weights"
    assert found.base and found.base.name == "base"
    assert plans(found).base == ModelRef.parse("base")
    assert any(
        line.startswith("distance from base in a sample of the weights, of its norm: a ") for line in found.facts
    )


def test_an_odd_model_does_not_hide_what_the_weights_of_the_others_tell(here: Path, base: Path) -> None:
    model(here / "a"), model(here / "b"), model(here / "wide", tensors(width=16))
    found = propose_recipe(["wide", "a", "b", "base"])
    assert (found.common.confidence, found.base and found.base.name) == ("by weights", "base")
    assert said(found) == [
        "wide has other shapes than base: model.embed_tokens.weight and 9 more, [32, 16] and [32, 8]"
    ]


def test_a_stated_base_that_does_not_fit_is_no_base(here: Path) -> None:
    model(here / "base", tensors(width=16))
    for name in ("a", "b"):
        model(here / name, card="base_model: ../base")
    found = propose_recipe(["a", "b"])
    assert plans(found).base is None
    assert found.doubts[0].startswith("base is named as base, but does not fit, so the recipe has none: a has other")


def test_of_two_models_without_a_word_none_is_the_base(here: Path, base: Path) -> None:
    model(here / "a")
    found = propose_recipe(["a", "base"])
    assert (found.base, found.common.confidence, found.method.name) == (None, "unknown", "linear")
    assert plans(found).base is None
    assert "one architecture (llama), the same shapes, tokenizers that cannot be compared" in found.facts
    assert "#   no card and no config names a base" in found.text


def test_three_finetunes_alone_are_averaged_with_a_hint(here: Path, base: Path) -> None:
    found = propose_recipe([str(model(here / name)) for name in ("a", "b", "c")])
    assert found.method.name == "linear"
    assert any("the likeliest by its weights: give --base" in doubt for doubt in found.doubts)
    plans(found)


def test_the_base_that_is_given_wins_over_what_cards_say(here: Path, base: Path) -> None:
    model(here / "old", tensors())
    model(here / "a", card="base_model: ../old")
    model(here / "b")
    found = propose_recipe(["a", "b"], "base")
    assert plans(found).base == ModelRef.parse("base")
    assert found.common.confidence == "given"
    assert found.doubts == ("the models name old as their base",)


def test_one_model_and_its_base_go_halfway(here: Path, base: Path) -> None:
    model(here / "a", card="base_model: ../base")
    for names in (["a"], ["base", "a"]):
        found = propose_recipe(names)
        assert [member.name for member in found.models] == ["a"]
        assert found.shared == {"lambda": 0.5}
        plans(found)


def test_a_merge_of_ours_states_its_base_by_its_recipe(here: Path, base: Path) -> None:
    model(here / "a", card="base_model: ../base"), model(here / "b", card="base_model: ../base")
    plans(propose_recipe(["a", "b"]))
    ctl_merge.merge("recipe.yaml", "merged")
    found = propose_recipe(["merged", str(model(here / "c", card="base_model: ../base"))])
    assert found.common.confidence == "stated"
    assert found.common.reasons[0] == "merged: its recipe in ctl_merge_recipe.yaml names base"
    (here / "merged" / "ctl_merge_recipe.yaml").unlink()
    (here / "merged" / "README.md").unlink()
    found = propose_recipe(["merged", "c"])  # its parents are in the manifest, which does not say which is the base
    assert found.base and found.base.name == "base"
    assert "merge_manifest.json" in found.common.reasons[0]


def test_config_json_is_a_trace_only(here: Path, base: Path) -> None:
    for name in ("a", "b"):
        model(here / name, _name_or_path="../base")
    found = propose_recipe(["a", "b"])
    assert found.common.confidence == "stated by some"
    assert found.doubts[0] == "a: config.json is no more than a trace of its origin"
    model(here / "a", _name_or_path="/data/runs/42/checkpoint-100")
    model(here / "b")
    assert propose_recipe(["a", "b"]).base is None


def test_strangers_and_twins_are_pointed_out(here: Path, base: Path) -> None:
    strange = {name: torch.randn(t.shape, generator=torch.Generator().manual_seed(9)) for name, t in tensors().items()}
    model(here / "strange", strange), model(here / "twin", tensors())
    found = propose_recipe(["base", "strange", "twin"])
    assert any(doubt.startswith("base and strange hardly have one origin: the cosine") for doubt in found.doubts)
    assert "base and twin have the same weights in a sample" in found.doubts
    assert "twin equals the base base in this sample" in propose_recipe(["twin", "strange"], "base").doubts


# ---- adapters


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base and two adapters on it, made by PEFT."""
    folder = tmp_path_factory.mktemp("adapted")
    first = train(folder, "llama", {}, {"target_modules": ["q_proj", "v_proj"]})
    second = train(folder, "llama", {}, {"target_modules": ["q_proj"]}, base=first.base, seed=1)
    return first.base, first.adapter, second.adapter


def test_adapters_alone_are_put_on_the_base_that_their_configs_name(
    adapted: tuple[Path, Path, Path], here: Path
) -> None:
    base, first, second = adapted
    found = propose_recipe([str(first), str(second)])
    recipe = plans(found)
    assert recipe.base and recipe.base.folder == base
    assert [source.ref.adapter and source.ref.adapter.folder for source in recipe.models] == [first, second]
    assert found.common.reasons[0] == f"{first.name}: its adapter_config.json names base"
    suggested = found.text.replace("# output: {lora", "output: {lora")
    assert suggested != found.text
    path = here / "adapter.yaml"
    path.write_text(suggested)
    assert Merge(path).summary() and Merge(path).recipe.lora


def test_a_model_with_its_adapter_states_its_base_by_its_name(adapted: tuple[Path, Path, Path], here: Path) -> None:
    base, first, second = adapted
    found = propose_recipe([f"{base}+{first}", str(base), str(second)])
    assert found.base and found.base.key == str(base)
    assert len(plans(found).models) == 2


# ---- what does not fit


def said(found: Proposal) -> list[str]:
    return [why for _, why in found.left_out]


def test_what_cannot_be_merged_is_left_out_with_its_reason(here: Path, base: Path) -> None:
    model(here / "a", card="base_model: ../base")
    model(here / "quantised", quantization_config={"quant_method": "gptq"})
    model(here / "wide", tensors(width=16))
    model(here / "deep", tensors(blocks=3), num_hidden_layers=3)
    model(here / "qwen", model_type="qwen2")
    found = propose_recipe(["a", "base", "quantised", "wide", "deep", "qwen"])
    assert said(found) == [
        "quantised is quantised (its config.json says so): name the unquantised model",
        "wide has other shapes than base: model.embed_tokens.weight and 9 more, [32, 16] and [32, 8]",
        "deep is of another depth than base: 3 layers and 2",
        "qwen is of another architecture: 'qwen2', base is 'llama'",
    ]
    assert [source.ref.text for source in plans(found).models] == ["a"]
    for name, why in zip(("quantised", "wide", "deep", "qwen"), said(found), strict=True):
        assert f"  # - model: {name}\n" in found.text
        assert why in " ".join(found.text.replace("#", "").split())


def test_without_a_base_the_majority_stays(here: Path) -> None:
    model(here / "odd", model_type="qwen2"), model(here / "a"), model(here / "b")
    found = propose_recipe(["odd", "a", "b"])
    assert said(found) == ["odd is of another architecture: 'qwen2', a is 'llama'"]
    plans(found)


def test_nothing_is_written_where_no_two_models_fit(here: Path, base: Path) -> None:
    model(here / "odd", model_type="qwen2")
    with pytest.raises(MismatchError, match="there are no two models to merge: odd is of another architecture"):
        propose_recipe(["base", "odd"])
    with pytest.raises(MismatchError, match="none of the models fits the base base: odd is of another"):
        propose_recipe(["odd"], "base")
    with pytest.raises(MismatchError, match="base is the only one, and its base is not known: give --base"):
        propose_recipe(["base"])
    with pytest.raises(MismatchError, match="base is the only one, .*; base/ is given twice: it goes in once"):
        propose_recipe(["base", "base/"])


def test_a_model_in_eight_bits_is_left_out(here: Path, base: Path) -> None:
    model(here / "a")
    low = {n: t.to(torch.float8_e4m3fn) if t.dim() > 1 else t for n, t in tensors().items()}
    model(here / "low", low)
    found = propose_recipe(["a", "low"], "base")
    assert said(found) == ["low is quantised (model.embed_tokens.weight is F8_E4M3): name the unquantised model"]


def with_tokens(folder: Path, tokens: list[str]) -> Path:
    vocabulary = {"model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}, "unk_token": "w0"}}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], **vocabulary}))
    return folder


def test_differing_vocabularies_are_united(here: Path) -> None:
    words = [f"w{i}" for i in range(32)]
    with_tokens(model(here / "base", tensors()), words)
    with_tokens(model(here / "a", tensors(rows=34)), [*words, "new", "newer"])
    found = propose_recipe(["a"], "base")
    assert found.tokenizer_source == "union"
    recipe = plans(found)
    assert recipe.tokenizer.source == "union"
    assert (
        "# The vocabularies differ: all tokens of all models; `base` would keep only those of the first." in found.text
    )
    assert Merge(recipe).plan.specs["model.embed_tokens.weight"].shape == (34, 8)


def test_rows_whose_tokens_are_unknown_cannot_be_put_together(here: Path, base: Path) -> None:
    model(here / "a", tensors(rows=34))
    with pytest.raises(MismatchError, match="its tokenizer is unknown"):
        propose_recipe(["a"], "base")
    assert said(propose_recipe(["a", str(model(here / "b"))], "base"))[0].startswith("the embedding rows of a cannot")


def test_tensors_that_only_some_have_are_settled_and_flagged(here: Path, base: Path) -> None:
    model(here / "a", {**moved(tensors(), 1), "score.weight": torch.ones(2, 8)})
    found = propose_recipe(["a"], "base")
    assert (found.missing, plans(found).missing) == ("base", "base")
    assert "# Not all models have the same tensors (base lacks 1 of a: score.weight): base's" in found.text


def test_the_dtype_of_the_base_is_kept_and_said(here: Path) -> None:
    model(here / "base", {name: tensor.bfloat16() for name, tensor in tensors().items()})
    model(here / "a")
    found = propose_recipe(["a"], "base")
    assert plans(found).dtype == "bfloat16"
    assert "# The models' differ (base bfloat16, a float32): base's is kept." in found.text
    assert propose_recipe(["base"], "a").dtype == "float32"


# ---- methods


@pytest.mark.parametrize("number", range(1, 10))
def test_lambda_keeps_orthogonal_task_vectors_at_the_length_of_one(number: int) -> None:
    vectors = np.eye(number)
    if number > 1:
        assert np.linalg.norm(scale(number) * vectors.sum(0)) == pytest.approx(1, abs=0.16)


@pytest.mark.parametrize("method", sorted(ctl_merge.methods.registry()))
def test_every_method_gives_a_recipe_that_plans_or_says_why_not(method: str, here: Path, base: Path) -> None:
    names = [str(model(here / name)) for name in ("a", "b")]
    try:
        found = propose_recipe(names, "base", method=method)
    except CtlMergeError as error:
        assert str(error).startswith(f"--method: {method}")
        assert method in ("regmean", "lot", "fisher", "nearswap", "passthrough")
    else:
        assert plans(found).method.name == method


def test_a_method_that_does_not_fit_is_refused_in_words(here: Path, base: Path) -> None:
    names = [str(model(here / name)) for name in ("a", "b")]
    for method, message in {
        "tise": "--method: there is no merge method 'tise' \\(did you mean 'ties'\\?\\): see `ctl-merge methods`",
        "ties": "--method: ties needs the base of the models, which is not known: give --base",
        "regmean": "--method: regmean measures each model on its own text, which only you can name",
        "passthrough": "--method: passthrough merges 1 model, not 2",
    }.items():
        with pytest.raises(RecipeError, match=message):
            propose_recipe(names, method=method)
    with pytest.raises(RecipeError, match="--method: nearswap needs `t`, for which there is no sane value"):
        propose_recipe(names[:1], "base", method="nearswap")


# ---- places


def test_names_are_found_from_where_the_recipe_lies(here: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "work" / "deep").mkdir(parents=True)
    model(here / "work" / "a", card="base_model: ../../base")
    monkeypatch.chdir(here / "work")
    path = Path("deep/recipe.yaml")
    recipe = plans(propose_recipe(["a"], path=path), path)
    assert recipe.models[0].ref.text == "../a"
    monkeypatch.chdir(here)
    assert [ref.folder for ref in Merge(here / "work" / path).recipe.refs] == [base, here / "work" / "a"]


def test_messages_tell_models_of_one_name_apart(here: Path, base: Path) -> None:
    (here / "x").mkdir(), (here / "y").mkdir()
    model(here / "x" / "m"), model(here / "y" / "m")
    assert [member.name for member in propose_recipe(["x/m", "y/m"]).models] == ["x/m", "y/m"]


# ---- cards that say anything


CARDS = st.one_of(
    st.text(max_size=200),
    st.builds(
        lambda data: "---\n" + yaml.safe_dump(data, allow_unicode=True) + "---\n",
        st.dictionaries(
            st.sampled_from(["base_model", "license", "tags", "base_model_relation"]),
            st.recursive(
                st.one_of(
                    st.none(), st.text(max_size=20), st.integers(), st.sampled_from(["../base", "base", "x/y\n"])
                ),
                lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner)),
                max_leaves=5,
            ),
        ),
    ),
    st.text(max_size=60).map(lambda text: f"---\nbase_model: {text}\n---\n"),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(card=CARDS, name=st.text(max_size=30))
def test_a_card_of_rubbish_changes_no_more_than_what_is_known(
    card: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ctl_merge.family.listed", lambda ref: (_ for _ in ()).throw(CheckpointError("offline")))
    monkeypatch.setattr("ctl_merge.stored.hub.resolve", lambda *_: (_ for _ in ()).throw(CheckpointError("offline")))
    for folder in ("a", "b"):
        model(tmp_path / folder, tensors(), _name_or_path=name)
        (tmp_path / folder / "README.md").write_text(card, "utf-8", errors="replace", newline="")
    found = propose_recipe(["a", "b"])
    assert len(ctl_merge.parse_recipe(found.text, relative_to=tmp_path).models) >= 1
    assert all(line.isprintable() for line in found.text.splitlines())
    stated_licence(tmp_path / "a")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("base_model: org/one", ["org/one"]),
        ("base_model: [org/one, 3, ' ', org/two]", ["org/one", "org/two"]),
        ("base_model: {a: b}", []),
        ("base_model:", []),
        ("- base_model", []),
    ],
)
def test_the_bases_that_a_card_states(card: str, expected: list[str], tmp_path: Path) -> None:
    for text in (f"---\n{card}\n---\n", f"\ufeff---\r\n{card}\r\n---\r\ntext"):
        (tmp_path / "README.md").write_text(text, "utf-8", newline="")
        assert stated_bases(tmp_path) == expected
    (tmp_path / "README.md").write_text(f"# A card\n---\n{card}\n---\n")  # no front matter
    assert stated_bases(tmp_path) == []


def test_metadata_that_is_no_yaml_is_told(here: Path, base: Path) -> None:
    model(here / "a", card="base_model: *nothing")
    found = propose_recipe(["a", "base"])
    assert "a: the metadata of README.md is not YAML: found undefined alias" in found.doubts


# ---- the Hub


@pytest.fixture
def published(server: HubServer, here: Path) -> dict[str, str]:
    """Commits of a base, a finetune of it, a finetune of that, and another finetune of the base."""
    cards = {"base": "license: mit", "mid": "base_model: org/base", "far": "base_model: org/mid"}
    cards["near"] = "base_model: org/base"
    (here / "up").mkdir()
    return {
        name: server.add(f"org/{name}", model(here / "up" / name, tensors() if name == "base" else None, card=card))
        for name, card in cards.items()
    }


def test_cards_on_the_hub_are_followed_and_commits_pinned(
    server: HubServer, published: dict[str, str], here: Path
) -> None:
    found = propose_recipe(["org/far", "org/near@main"])
    recipe = ctl_merge.parse_recipe(found.text)
    assert [ref.text for ref in recipe.refs] == [f"org/{n}@{published[n]}" for n in ("base", "far", "near")]
    assert found.text.count("# the commit that main is now") == 3
    assert found.common.reasons == (
        "org/far: its card names org/mid, whose card names org/base", "org/near: its card names org/base",
    )  # fmt: skip
    assert found.nbytes == 3 * (here / "up" / "base" / WEIGHTS).stat().st_size
    assert not list((here / "huggingface").rglob(WEIGHTS))  # headers came by ranges
    plans(found)


def test_a_commit_that_is_named_is_no_branch(server: HubServer, published: dict[str, str], here: Path) -> None:
    found = propose_recipe([f"org/near@{published['near']}"])
    assert found.text.count("# the commit that main is now") == 1  # the base's


def test_a_base_out_of_reach_leaves_a_merge_without_one(server: HubServer, here: Path) -> None:
    for name in ("a", "b"):
        model(here / name, card="base_model: org/gone")
    found = propose_recipe(["a", "b"])
    assert (found.base, found.method.name) == (None, "linear")
    assert any(
        line.startswith("the base org/gone cannot be read, so the recipe has none: org/gone@main:")
        for line in found.doubts
    )
    plans(found)
    with pytest.raises(MismatchError, match="a is the only one, .*: give --base; the base org/gone"):
        propose_recipe(["a"])


def test_a_card_out_of_reach_is_told(server: HubServer, published: dict[str, str], here: Path) -> None:
    server.fault("org/mid", status=404)
    found = propose_recipe(["org/far", "org/near"])
    assert found.base is None
    assert any(line.startswith("the card of org/mid cannot be read: org/mid@main:") for line in found.doubts)


def test_an_ancestor_may_be_anything(server: HubServer, here: Path, base: Path) -> None:
    (here / "gguf").mkdir()
    (here / "gguf" / "README.md").write_text("---\nbase_model: org/base\n---\n")  # no config.json, no weights
    (here / "gguf" / "model.gguf").write_bytes(b"GGUF")
    server.add("org/gguf", here / "gguf")
    server.add("org/base", base)
    model(here / "a", card="base_model: org/gguf")
    model(here / "b", card="base_model: [org/base, org/bare]")
    server.add("org/bare", model(here / "bare"))
    found = propose_recipe(["a", "b"])
    assert found.common.reasons[0] == "a: its card names org/gguf, whose card names org/base"
    assert plans(found).base


def test_a_card_on_the_hub_names_no_folder_of_this_machine(server: HubServer, here: Path, base: Path) -> None:
    for name in ("a", "b"):
        server.add(f"org/{name}", model(here / "up" / name, card=f"base_model: {base}"))
    found = propose_recipe(["org/a", "org/b"])
    assert found.base is None
    assert f"org/a: its card names {str(base)!r}, which is no model here" in found.doubts


# ---- the command


def test_the_first_command_of_a_newcomer(ctl: Ctl, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    done = ctl("init", QUICKSTART / "cycle", QUICKSTART / "shift")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("wrote recipe.yaml\n · task_arithmetic of cycle, shift")
    assert "ctl-merge recipe.yaml --dry-run" in done.out
    assert max(map(len, done.out.splitlines())) <= 100
    text = (here / "recipe.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 120
    dry = ctl("recipe.yaml", "--dry-run")
    assert (dry.code, dry.err) == (0, "")
    again = ctl("init", QUICKSTART / "cycle", QUICKSTART / "shift")
    assert (again.code, again.out) == (2, "")
    assert again.err == "error: recipe.yaml exists: choose another file with -o, or --overwrite to replace it\n"
    assert (here / "recipe.yaml").read_text() == text


def test_json_says_the_same(ctl: Ctl, here: Path) -> None:
    (here / "my recipe.yaml").write_text("old")
    done = ctl(
        "init", QUICKSTART / "cycle", QUICKSTART / "shift", "--json", "-o", "my recipe.yaml", "--overwrite",
        "--method", "slerp",
    )  # fmt: skip
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["recipe"] == (here / "my recipe.yaml").read_text()
    assert (data["method"], data["base"]["confidence"]) == ("slerp", "stated")
    assert data["next"] == ["ctl-merge 'my recipe.yaml' --dry-run", "ctl-merge 'my recipe.yaml' -o merged"]
    assert [m["name"] for m in data["models"]] == ["shift"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bsae", "a"], r"bsae@main: .* \(There is no folder 'bsae' either\.\) \(did you mean 'base'\?\)"),
        (["./bsae", "a"], "'./bsae' is neither a folder that exists nor .* \\(did you mean 'base'\\?\\)"),
        (["base/model.safetensors", "a"], "'base/model.safetensors' is a file: a model is a folder, org/name or"),
        (["a"], "a has no config.json: is it a model in the Hugging Face format?"),
    ],
)
def test_a_model_that_is_mistyped_is_found_near(
    names: list[str], message: str, server: HubServer, here: Path, base: Path
) -> None:
    (model(here / "a") / "config.json").unlink()
    with pytest.raises(CtlMergeError, match=message):
        propose_recipe(names)


def test_where_nothing_can_be_written_nothing_is_read(here: Path) -> None:
    from ctl_merge.starting import require_free

    (here / "locked").mkdir()
    for path, message in {
        here: "is a folder: name a file for the recipe, such as -o .*recipe.yaml",
        here / "none" / "r.yaml": "cannot be written: there is no folder '.*none'",
    }.items():
        with pytest.raises(OutputError, match=message):
            require_free(path, overwrite=True)
    (here / "dangling").symlink_to("nowhere")
    with pytest.raises(OutputError, match="exists: choose another file"):
        require_free(here / "dangling", overwrite=False)


def test_a_name_that_is_no_model_is_an_error_and_leaves_no_file(ctl: Ctl, here: Path) -> None:
    done = ctl("init", "no such/model")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: 'no such/model' is neither a folder that exists nor a Hub repository")
    assert list(here.iterdir()) == []


# ---- architectures, and the real family


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "t5", "vit", "mamba", "llava"])
def test_any_architecture(name: str, here: Path) -> None:
    build(name).save_pretrained(here / "base")
    for seed, folder in enumerate(("a", "b")):
        torch.manual_seed(seed)
        changed = build(name)
        changed.load_state_dict({n: t + 0.01 * torch.randn_like(t) for n, t in changed.state_dict().items()})
        changed.save_pretrained(here / folder)
    assert plans(propose_recipe(["a", "b"], "base")).method.name == "task_arithmetic"


@pytest.mark.real
@pytest.mark.skipif(not FAMILY.is_dir(), reason="the real model family is not beside the project")
def test_a_real_family(here: Path) -> None:
    names = [str(FAMILY / name) for name in ("math", "code", "french", "wiki", "stories260K")]
    found = propose_recipe(names)  # nothing is stated: no cards
    assert (found.common.confidence, found.base and found.base.name) == ("by weights", "stories260K")
    assert plans(found).base == ModelRef.parse(names[-1])
    adapters = propose_recipe([str(FAMILY / "math-lora"), str(FAMILY / "code-lora")])
    assert adapters.common.confidence == "stated"
    assert len(plans(adapters).models) == 2
    assert propose_recipe(names[:2]).base is None
    hinted = propose_recipe([names[0], names[1], names[-1]])  # too near to right angles elsewhere to be sure
    assert hinted.base is None
    assert any("stories260K is the likeliest by its weights" in doubt for doubt in hinted.doubts)
