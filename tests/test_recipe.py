"""Recipes: what is accepted and what it means; what is refused, all of it at once, each with its line."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, SchemaError

from ctl_merge.errors import CheckpointError, RecipeError
from ctl_merge.json_schema import recipe_schema
from ctl_merge.methods import registry
from ctl_merge.recipe import Recipe
from ctl_merge.recipe_file import load_recipe, parse_recipe
from ctl_merge.recipe_tokenizer import TokenizerSetting
from ctl_merge.reference import ModelRef

MERGEKIT = Path(__file__).parents[2] / "shared" / "mergekit_configs"

LINEAR = """\
merge_method: linear
models:
  - model: org/a
    parameters:
      weight: 1
  - model: org/b
    parameters:
      weight: 2.5
"""
TIES = """\
merge_method: ties
base_model: org/base
models:
  - model: org/a
    parameters: {weight: 1, density: 0.5}
parameters: {lambda: 0.7}
"""


def problems(text: str, name: str = "recipe") -> list[str]:
    """What a recipe is refused for, a line each: `3: …`."""
    with pytest.raises(RecipeError) as refused:
        parse_recipe(text, name)
    first, *lines = str(refused.value).splitlines()
    if not lines:
        return [first]
    assert first == f"{name}: {len(lines)} problem(s) in the recipe"
    return [line.removeprefix("  line ") for line in lines]


def refs(recipe: Recipe) -> list[str]:
    return [str(ref) for ref in recipe.refs]


# ---- what a recipe means


def test_a_recipe_and_its_defaults() -> None:
    recipe = parse_recipe(LINEAR)
    assert recipe.method.name == "linear"
    assert refs(recipe) == ["org/a", "org/b"]
    assert [source.settings["weight"].at("any", 0.0) for source in recipe.models] == [1.0, 2.5]
    assert (recipe.base, recipe.dtype, recipe.seed, recipe.missing) == (None, None, 0, "error")
    assert not recipe.allow_nonfinite and recipe.tokenizer == TokenizerSetting()
    assert recipe.text == LINEAR and recipe.warnings == ()


def test_every_key() -> None:
    keys = "dtype: float16\nout_dtype: bfloat16\nseed: 7\nmissing: skip\nnonfinite: allow\ntokenizer_source: base\n"
    recipe = parse_recipe(TIES + keys)
    assert recipe.base == ModelRef("org/base", repo_id="org/base", revision="main")
    assert recipe.settings["lambda"].at("any", 0.0) == 0.7
    assert (recipe.dtype, recipe.seed, recipe.missing) == ("bfloat16", 7, "skip")
    assert recipe.allow_nonfinite and recipe.tokenizer.source == "base"
    assert parse_recipe(TIES + "dtype: float16").dtype == "float16"


def test_the_base_comes_first_and_counts_as_the_method_sees_it() -> None:
    assert refs(parse_recipe(TIES)) == ["org/base", "org/a"]
    assert [str(source.ref) for source in parse_recipe(TIES).models] == ["org/a"]
    listed = TIES.replace("models:", "models:\n  - model: org/base")
    assert parse_recipe(listed).models == parse_recipe(TIES).models
    assert parse_recipe(listed).warnings == ()


def test_parameters_of_a_base_listed_among_the_models_are_told_to_have_no_effect() -> None:
    listed = TIES.replace("models:", "models:\n  - {model: org/base, parameters: {weight: 1}}")
    assert parse_recipe(listed).warnings == (
        "parameters of the base model have no effect: its own task vector is zero",
    )


@pytest.mark.parametrize("order", [["org/base", "org/a"], ["org/a", "org/base"], ["org/a"]])
def test_slerp_starts_at_the_base_wherever_it_is_listed(order: list[str]) -> None:
    models = "".join(f"- model: {name}\n" for name in order)
    recipe = parse_recipe(f"merge_method: slerp\nbase_model: org/base\nmodels:\n{models}parameters: {{t: 0.3}}\n")
    assert [str(source.ref) for source in recipe.models] == ["org/base", "org/a"]


@pytest.mark.parametrize(
    "form",
    ["org/a@v1", "{path: org/a, revision: v1}", "{model: {path: org/a, revision: v1}}", "{model: org/a@v1}"],
)
def test_mergekits_long_forms_of_a_model(form: str) -> None:
    ref = parse_recipe(TIES.replace("model: org/a", f"model: {form}").replace("{weight", " {weight")).models[0].ref
    assert (ref.repo_id, ref.revision) == ("org/a", "v1")
    base = parse_recipe(TIES.replace("org/base", form.replace("org/a", "org/base"))).base
    assert base and (base.repo_id, base.revision) == ("org/base", "v1")


@pytest.mark.parametrize(
    "form",
    [
        "org/a@v1+org/lora@v2", "{path: org/a@v1+org/lora@v2}", "{model: org/a@v1+org/lora@v2}",
        "{model: org/a@v1, lora: org/lora@v2}", "{model: {path: org/a, revision: v1}, lora: org/lora@v2}",
        "{model: {path: org/a, revision: v1}, lora: {path: org/lora, revision: v2}}",
    ],
)  # fmt: skip
def test_every_form_of_a_model_with_an_adapter_is_the_same(form: str) -> None:
    recipe = parse_recipe(TIES.replace("model: org/a", f"model: {form}").replace("{weight", " {weight"))
    ref = recipe.models[0].ref
    assert ref == ModelRef.parse("org/a@v1+org/lora@v2")
    assert (str(ref), ref.short) == ("org/a@v1+org/lora@v2", "org/a+org/lora")
    assert (ref.repo_id, ref.revision, ref.bare) == ("org/a", "v1", ModelRef.parse("org/a@v1"))
    assert str(ref.bare) == "org/a@v1"
    assert ref.adapter == ModelRef.parse("org/lora@v2")
    assert ref not in (ModelRef.parse("org/a@v1+org/lora"), ref.bare)
    assert parse_recipe(TIES.replace("org/base", form)).base == ref


def test_an_adapter_of_nothing_is_none() -> None:
    assert parse_recipe(LINEAR.replace("org/a", "{model: org/a, lora: }")).models[0].ref == ModelRef.parse("org/a")


def test_a_plus_may_be_part_of_a_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a+b", "c+d", "a", "lora"):
        (tmp_path / name).mkdir()
    assert ModelRef.parse("a+b").adapter is None
    both = ModelRef.parse("a+b+c+d")
    assert (both.folder, both.adapter) == (tmp_path / "a+b", ModelRef.parse("c+d"))
    assert ModelRef.parse("org/a+./lora").adapter == ModelRef.parse("lora")
    (tmp_path / "b+c+d").mkdir()
    with pytest.raises(CheckpointError, match=r"'a\+b\+c\+d' can be cut into a model and its adapter in 2 ways"):
        ModelRef.parse("a+b+c+d")


def test_folders_are_looked_for_where_the_recipe_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes" / "org" / "a").mkdir(parents=True)
    path = tmp_path / "recipes" / "recipe.yaml"
    path.write_text(LINEAR)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    assert recipe.models[0].ref.folder == tmp_path / "recipes" / "org" / "a"
    assert recipe.models[1].ref.repo_id == "org/b"
    (tmp_path / "org" / "a").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"line 3: 'org/a' is a folder in the working directory and another one"):
        load_recipe(path)


def test_int8_mask_is_mergekits_and_has_no_effect() -> None:
    recipe = parse_recipe(TIES.replace("lambda: 0.7", "int8_mask: true"))
    assert recipe.warnings == ("`int8_mask` concerns mergekit's memory use only and has no effect here",)
    assert recipe.settings == {}


def test_a_model_listed_twice_counts_twice_and_is_told() -> None:
    recipe = parse_recipe(LINEAR.replace("org/b", "org/a"))
    assert len(recipe.models) == 2 and refs(recipe) == ["org/a"]
    assert "a model is listed more than once" in recipe.warnings[0]


def test_numbers_may_stand_in_quotes() -> None:
    recipe = parse_recipe(
        "merge_method: consensus\nbase_model: org/base\nmodels: [{model: org/a, parameters: {tall_lambda: '0.25'}}, "
        "{model: org/b}]\nparameters: {k: '2', lambda: '1e-1'}"
    )
    assert recipe.models[0].settings["tall_lambda"].at("x", 0) == 0.25
    assert recipe.settings["k"].at("x", 0) == 2 and recipe.settings["lambda"].at("x", 0) == 0.1


def test_flags_may_be_written_as_numbers() -> None:
    recipe = parse_recipe(LINEAR + "parameters: {normalize: 0}")
    assert recipe.settings["normalize"].at("any", 0.0) is False


# ---- what is refused


def test_every_problem_is_told_at_once_with_its_line_and_the_nearest_name() -> None:
    found = problems(
        """\
merge_method: ties
models:
  - model: org/a
    parameters:
      weight: heavy
      density: 2
      wieght: 1
  - model: not a model
    params: {}
base_modl: org/c
dtype: int8
seed: -1
missing: maybe
slices: []
parameters:
  lamda: 1
tokenizer_source: not a model
"""
    )
    expected = [
        "5: `weight`: input should be a valid number (it is 'heavy')",
        "6: `density`: input should be less than or equal to 1 (it is 2)",
        "7: ties has no parameter 'wieght' (did you mean 'weight'?)",
        "8: 'not a model' is neither a folder that exists nor a Hub repository (org/name or org/name@revision)",
        "9: unknown key 'params' (did you mean 'parameters'?)",
        "10: unknown key 'base_modl' (did you mean 'base_model'?)",
        "11: `dtype`: input should be 'float32', 'float16', 'bfloat16' or 'float64' (it is 'int8')",
        "12: `seed`: input should be greater than or equal to 0 (it is -1)",
        "13: `missing`: input should be 'error', 'base' or 'skip' (it is 'maybe')",
        "14: `slices` is empty",
        "14: give one of `models`, `slices`, `modules`; there is `models` and `slices`",
        "16: ties has no parameter 'lamda' (did you mean 'lambda'?)",
        "17: 'not a model' is neither a folder that exists nor a Hub repository (org/name or org/name@revision)",
    ]
    assert found == expected


def with_weight(value: str) -> str:
    return LINEAR.replace("weight: 1", f"weight: {value}")


# Changed recipe -> line and part of the one problem that it has.
WRONG: dict[str, tuple[str, str]] = {
    "typo of a method": (LINEAR.replace("linear", "linaer"), "1: no merge method 'linaer' (did you mean 'linear'?)"),
    "no method": (LINEAR.partition("\n")[2], "1: `merge_method` is missing"),
    "method is a list": (LINEAR.replace("linear", "[linear]"), "1: `merge_method`: input should be a valid string"),
    "no models": ("merge_method: linear\n", "1: give one of `models`, `slices`, `modules`; there is none of them"),
    "models empty": ("merge_method: linear\nmodels: []\n", "2: `models` is empty"),
    "models is a name": ("merge_method: linear\nmodels: a/b\n", "2: `models`: input should be a valid list"),
    "model is a bare name": (LINEAR + "  - org/c\n", "9: a model is written as `model: org/name`"),
    "model is a number": (LINEAR.replace("org/a", "5"), "3: `models.0.model`: input should be a valid string"),
    "model is empty": (LINEAR.replace("org/a", '""'), "3: '' names no model"),
    "model has an unknown key": (LINEAR.replace("org/a", "{path: a/b, lora: c/d}"), "3: unknown key 'lora'"),
    "model has a revision that is none": (
        LINEAR.replace("org/a", "{path: a/b, revision: 1}"), "3: `models.0.model.revision`: input should be a valid"
    ),
    "two adapters": (LINEAR.replace("org/a", "a/b+c/d+e/f"), "3: 'a/b+c/d+e/f' is neither a folder that exists nor"),
    "an adapter twice": (
        LINEAR.replace("org/a", "{model: a/b+c/d, lora: e/f}"), "3: a/b+c/d+e/f: one adapter on a model; merge"
    ),
    "an adapter that is nothing": (LINEAR.replace("org/a", "org/a+"), "3: 'org/a+' is neither a folder that exists"),
    "an adapter that is no name": (
        LINEAR.replace("org/a", "{model: org/a, lora: 'no/such/folder'}"), "3: 'no/such/folder' is neither a folder"
    ),
    "an adapter that is a number": (
        LINEAR.replace("org/a", "{model: org/a, lora: 5}"), "3: `models.0.model.lora`: input should be a valid string"
    ),
    "an adapter has an unknown key": (
        LINEAR.replace("org/a", "{model: org/a, lora: {path: c/d, revison: v1}}"),
        "3: unknown key 'revison' (did you mean 'revision'?)",
    ),
    "a home that is not there": (LINEAR.replace("org/a", "~nobody-here/m"), "3: '~nobody-here/m' is neither a folder"),
    "a name beyond the file system": (LINEAR.replace("org/a", "a" * 5000), "3: 'aaaa"),
    "control characters": (LINEAR.replace("org/a", '"org/a\\n"'), r"3: 'org/a\n' names no model"),
    "parameters is a list": (LINEAR + "parameters: [1]\n", "9: `parameters`: input should be a valid dictionary"),
    "shared parameter given to a model": (
        LINEAR.replace("weight: 1", "weight: 1\n      normalize: true"),
        "6: 'normalize' is shared by all models: move it to the recipe's own `parameters`",
    ),
    "no weight": (
        LINEAR.replace("    parameters:\n      weight: 1\n", ""), "3: the model org/a has no `weight`: give it one"
    ),
    "weight is text": (with_weight('"one"'), "5: `weight`: input should be a valid number (it is 'one')"),
    "weight is a flag": (with_weight("true"), "5: `weight`: input should be a valid number (it is True)"),
    "weight is not finite": (with_weight(".inf"), "5: `weight`: input should be a finite number (it is inf)"),
    "weight is nothing": (with_weight(""), "5: `weight`: input should be a valid number (it is None)"),
    "weight is a date": (with_weight("2024-01-01"), "5: `weight`: input should be a valid number"),
    "a gradient of nothing": (with_weight("[]"), "5: an empty gradient: give at least one value"),
    "a gradient with text": (with_weight("[1, x]"), "5: `weight`: input should be a valid number (it is [1, 'x'])"),
    "a choice without value": (with_weight("[{filter: mlp}]"), "5: `value` is missing"),
    "a choice with a typo": (with_weight("[{value: 1, fliter: mlp}]"), "5: unknown key 'fliter'"),
    "a filter that is no text": (with_weight("[{value: 1, filter: 3}]"), "5: a filter is part of a tensor's name"),
    "a flag out of range": (
        LINEAR + "parameters: {normalize: 2}\n", "9: `normalize`: input should be a valid boolean (it is 2)"
    ),
    "a choice of words": (
        TIES.replace("lambda: 0.7", "trim: layer"), "6: `trim`: input should be 'tensor' or 'model' (it is 'layer')"
    ),
    "density below zero": (TIES.replace("0.5", "-0.1"), "5: `density`: input should be greater than or equal to 0"),
    "seed with a fraction": (LINEAR + "seed: 1.5\n", "9: `seed`: input should be a valid integer (it is 1.5)"),
    "seed is text": (LINEAR + "seed: '1'\n", "9: `seed`: input should be a valid integer (it is '1')"),
    "a key that is a number": (LINEAR + "7: x\n", "9: `7`: keys should be strings"),
    "weight without bound": (TIES.replace("weight: 1,", "weight: 1.0e+308,"), "5: `weight`: input should be less than"),
    "quoted part of a number": (TIES.replace("weight: 1,", "weight: '0.5x',"), "5: `weight`: input should be a valid"),
    "architecture of mergekit's": (
        "merge_method: linear\nmodels: [{model: {model: org/a, override_architecture: X}, parameters: {weight: 1}}]",
        "2: `override_architecture` chooses one of mergekit's tables of tensors; here is none: remove it",
    ),
    "base of a passed slice": (
        "merge_method: passthrough\nslices: [{base_model: org/b, sources: [{model: org/a, layer_range: [0, 2]}]}]",
        "2: a slice of passthrough has no `base_model`: remove it",
    ),
    "three layers in a range": (
        "merge_method: passthrough\nslices: [{sources: [{model: org/a, layer_range: [0, 2, 3]}]}]",
        "2: `layer_range` is [first, end], the layers from first on and before end, not [0, 2, 3]",
    ),
    "no base": (TIES.replace("base_model: org/base\n", ""), "1: ties needs a `base_model`"),
    "a base where none is taken": (
        "merge_method: passthrough\nbase_model: org/b\nmodels: [{model: org/a}]\n",
        "2: passthrough takes no `base_model`",
    ),
    "two models for passthrough": (
        "merge_method: passthrough\nmodels: [{model: org/a}, {model: org/b}]\n", "2: passthrough merges 1 models"
    ),
    "three models for slerp": (
        "merge_method: slerp\nbase_model: org/a\nmodels: [{model: org/b}, {model: org/c}]\nparameters: {t: 0.5}\n",
        "3: slerp merges 2 models, the base included; the recipe has 3",
    ),
    "one model for slerp": (
        "merge_method: slerp\nbase_model: org/a\nmodels: [{model: org/a}]\nparameters: {t: 0.5}\n",
        "3: slerp merges 2 models, the base included; the recipe has 1",
    ),
    "slerp without its parameter": (
        "merge_method: slerp\nbase_model: org/a\nmodels: [{model: org/b}]\n", "1: the parameter `t` is missing"
    ),
    "slices": (
        "merge_method: passthrough\nslices: [{sources: []}]\n",
        "2: `slices.0.sources` is empty",
    ),
    "slice": (
        "merge_method: passthrough\nslices: [x]\n",
        "2: `slices.0` is a mapping of sources, base_model, parameters, not 'x'",
    ),
    "modules": (
        "merge_method: passthrough\nmodules: {x: y}\n",
        "2: `modules.x` is a mapping of models, slices, parameters, not 'y'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_recipe_is_refused_with_its_line(what: str) -> None:
    text, expected = WRONG[what]
    found = problems(text)
    assert len(found) == 1 and found[0].startswith(expected), found


@pytest.mark.parametrize("key", ["slices", "modules", "tokenizer", "chat_template"])
def test_a_later_key_without_value_says_nothing(key: str) -> None:
    assert refs(parse_recipe(LINEAR + f"{key}: null\n")) == ["org/a", "org/b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("genome: {}\n", "a mergekit-evolve genome is not a recipe: it describes a search"),
        ("merge_method: moe\nexperts: []\n", "line 1: `experts` make a mixture of experts, which has no"),
    ],
)
def test_the_documents_of_mergekits_other_tools_are_refused_by_name(text: str, expected: str) -> None:
    assert expected in problems(text)[0]


# ---- YAML itself

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
KEY_BOMB = "? [&a0 [x, x], " + ", ".join(f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)) + "]\n: x\n"
MERGE_BOMB = "a0: &a0 {k: v}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)
NO_YAML = {
    "empty": "",
    "a comment": "# nothing\n",
    "a list": "- a\n- b\n",
    "a word": "recipe\n",
    "a tab": "\tmerge_method: linear\n",
    "an open bracket": "models: [\n",
    "a control character": "merge_method: \x00\n",
    "an unknown tag": "merge_method: !!python/object/apply:os.system [ls]\n",
    "an unknown alias": "merge_method: *nobody\n",
    "a flag that is none": "merge_method: !!bool maybe\n",
    "a number that is none": "merge_method: !!int ''\n",
    "a date that is none": "merge_method: !!timestamp yesterday\n",
    "a number beyond all bounds": "merge_method: " + "1:" * 400 + "1.5\n",
    "a key that is a list": "? [a, b]\n: c\n",
    "recursion": "models: &a [*a]\n",
    "recursion through a mapping": "models: &a {x: *a}\n",
    "deep lists": "[" * 20_000,
    "deep mappings": "{a: " * 5_000,
    "150 levels": "models: " + "[" * 150 + "]" * 150,
    "alias bomb": BOMB,
    "alias bomb in a key": KEY_BOMB,
    "alias bomb of merge keys": MERGE_BOMB,
    "a number of 9000 digits": f"seed: 0x{'f' * 9000}\n",
    "a key of 9000 digits": f"0x{'f' * 9000}: 1\n",
}  # fmt: skip


@pytest.mark.parametrize("what", NO_YAML)
def test_what_is_no_recipe_at_all_is_refused_soon(what: str) -> None:
    start = time.monotonic()
    with pytest.raises(RecipeError, match=r"^recipe\b"):
        parse_recipe(NO_YAML[what])
    assert time.monotonic() - start < 5


def test_the_place_of_a_syntax_error_is_told() -> None:
    assert problems("merge_method: linear\nmodels: [\n")[0].startswith("recipe, line 3: not a YAML recipe: ")


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        (LINEAR + "merge_method: ties\n", 9, "merge_method"),
        (LINEAR.replace("weight: 1", "weight: 1\n      weight: 2"), 6, "weight"),
        ('seed: 1\n"seed": 2\n', 2, "seed"),
    ],
)
def test_a_key_given_twice_is_refused_where_it_stands_again(text: str, line: int, key: str) -> None:
    assert problems(text) == [f"recipe, line {line}: {key!r} is given twice"]


def test_anchors_and_merge_keys_are_yaml_and_fine() -> None:
    text = LINEAR.replace("parameters:\n      weight: 1", "parameters: &p {weight: 1}").replace(
        "parameters:\n      weight: 2.5", "parameters: {<<: *p}"
    )
    assert [source.settings["weight"].at("any", 0) for source in parse_recipe(text).models] == [1.0, 1.0]


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    absent, folder, binary, huge = (tmp_path / name for name in ("absent.yaml", "folder", "binary.yaml", "huge.yaml"))
    folder.mkdir()
    binary.write_bytes(b"merge_method: \xff\xfe\n")
    huge.write_bytes(b"#" * 1_000_001)
    for path, expected in [
        (absent, f"the recipe '{absent}' cannot be read: No such file or directory"),
        (folder, f"the recipe '{folder}' cannot be read: Is a directory"),
        (binary, f"{binary}: not UTF-8 text (invalid start byte at byte 14): save it as UTF-8"),
        (huge, f"{huge}: larger than 1,000,000 bytes, which is no recipe"),
    ]:
        with pytest.raises(RecipeError, match=f"^{re.escape(expected)}$"):
            load_recipe(path)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + LINEAR.replace("\n", "\r\n").encode())
    assert refs(load_recipe(path)) == ["org/a", "org/b"]


# ---- arbitrary input

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.binary(max_size=3)
    | st.sampled_from(["linear", "ties", "slerp", "passthrough", "org/a", "org/b@x", "mlp", "base", "float16", ""])
    | st.text(max_size=6)
)  # fmt: skip
KEYS = st.sampled_from(
    "merge_method models model base_model parameters weight density t lambda normalize value filter path revision seed "
    "dtype missing slices sources layer_range modules name tokenizer_source experts str ModelSchema".split()
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.integers(), inner, max_size=4),
    max_leaves=12,
)
SETTINGS = settings(max_examples=200, deadline=None)


def only_recipe_errors(action: Callable[[], object]) -> None:
    try:
        assert isinstance(action(), Recipe)
    except RecipeError as error:
        assert str(error)


@SETTINGS
@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_only_recipe_errors_come_out_of_yaml(data: dict[str, Any]) -> None:
    only_recipe_errors(lambda: parse_recipe(yaml.safe_dump(data)))


@SETTINGS
@given(VALUES, VALUES, VALUES)
def test_only_recipe_errors_come_out_of_odd_values(model: Any, weight: Any, shared: Any) -> None:
    data = {"merge_method": "linear", "models": [{"model": model, "parameters": {"weight": weight}}]}
    only_recipe_errors(lambda: parse_recipe(yaml.safe_dump(data | {"parameters": shared})))


@SETTINGS
@given(st.text(st.sampled_from(list("merg_thod: linear\n-&*!{}[],?|>'\"#%@0x.~<\t\x00\u2028\ufeff")), max_size=40))
def test_only_recipe_errors_come_out_of_text(text: str) -> None:
    only_recipe_errors(lambda: parse_recipe(text))
    only_recipe_errors(lambda: parse_recipe(LINEAR + text))


@SETTINGS
@given(st.integers(0, len(TIES)), st.integers(0, 30), st.text(max_size=3))
def test_only_recipe_errors_come_out_of_damaged_recipes(start: int, length: int, text: str) -> None:
    only_recipe_errors(lambda: parse_recipe(TIES[:start] + text + TIES[start + length :]))


# ---- the JSON schema


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    return Draft202012Validator(recipe_schema())


def once(node: Any, seen: set[str], schema: bool = True) -> Any:
    """A schema with `true` in place of each of its parts that it has had already: what is left is all that it says."""
    if isinstance(node, list):
        return [once(part, seen) for part in node]
    if not isinstance(node, dict):
        return node
    if schema:
        text = json.dumps(node)
        if text in seen:
            return True
        seen.add(text)
    maps = ("properties", "patternProperties", "$defs")
    return {key: once(value, seen, not (schema and key in maps)) for key, value in node.items()}


def test_the_schema_is_one() -> None:
    seen: set[str] = set()
    Draft202012Validator.check_schema(once(recipe_schema(), seen))
    assert len(seen) > 100
    broken = once({"properties": {"a": {"type": "string"}, "b": {"items": {"type": "no"}}}}, set())
    with pytest.raises(SchemaError, match="'no' is not valid"):
        Draft202012Validator.check_schema(broken)


def test_the_schema_knows_every_method_and_parameter() -> None:
    branches = {branch["if"]["properties"]["merge_method"]["const"]: branch for branch in recipe_schema()["allOf"]}
    assert set(branches) == set(registry())
    for name, method in registry().items():
        properties = branches[name]["then"]["properties"]
        assert set(properties["parameters"]["properties"]) - {"int8_mask"} == set(method.parameters)
        own = properties["models"]["items"]["properties"]["parameters"]["properties"]
        assert set(own) - {"int8_mask"} == {n for n, p in method.parameters.items() if p.per_model}
    text = properties["parameters"]["properties"]
    assert all(text[n]["description"] for n in method.parameters)


@pytest.mark.parametrize(
    "text",
    [
        LINEAR,
        TIES,
        LINEAR + "parameters: {normalize: false, int8_mask: true}\n",
        with_weight("[0, 0.5, 1]"),
        with_weight("[{value: [0, 1], filter: mlp}, {value: 0.5}]"),
        with_weight("{value: 1, filter: '*'}"),
        TIES.replace("org/base", "{model: {path: org/base, revision: v1}}"),
        TIES.replace("org/base", "{model: {path: org/base, revision: v1}, lora: {path: org/lora, revision: v2}}"),
        TIES.replace("model: org/a", "model: {model: org/a, lora: org/lora}"),
        TIES + "dtype: bfloat16\nseed: 3\nmissing: base\nnonfinite: allow\ntokenizer_source: base\n",
    ],
)
def test_the_schema_accepts_what_is_a_recipe(schema: Draft202012Validator, text: str) -> None:
    parse_recipe(text)
    assert [error.message for error in schema.iter_errors(yaml.safe_load(text))] == []


# What only the whole recipe, the machine or the Hub can tell is not the schema's.
BEYOND_A_SCHEMA = {
    "model is empty", "two adapters", "an adapter twice", "an adapter that is nothing", "an adapter that is no name",
    "a home that is not there", "a name beyond the file system", "control characters",
    "no weight", "no base", "only the base", "a base where none is taken", "two models for passthrough",
    "three models for slerp", "one model for slerp", "slerp without its parameter", "weight is not finite",
    "a key that is a number", "base of a passed slice",
}  # fmt: skip


@pytest.mark.parametrize("what", [what for what in WRONG if what not in BEYOND_A_SCHEMA])
def test_the_schema_refuses_what_is_wrong_in_form(schema: Draft202012Validator, what: str) -> None:
    assert not schema.is_valid(yaml.safe_load(WRONG[what][0]))


@SETTINGS
@given(
    st.sampled_from(["linear", "ties", "slerp", "passthrough"]),
    st.dictionaries(st.sampled_from("weight density t normalize trim scale".split()), VALUES, max_size=2),
    st.dictionaries(st.sampled_from("dtype seed missing nonfinite".split()), LEAVES, max_size=2),
)
def test_the_schema_accepts_whatever_is_a_recipe(
    schema: Draft202012Validator, method: str, parameters: dict, keys: dict
) -> None:
    models = [{"model": "org/a", "parameters": parameters}]
    data = {"merge_method": method, "base_model": "org/base", "models": models, "parameters": {}, **keys}
    try:
        parse_recipe(yaml.safe_dump(data))
    except RecipeError:
        return
    assert [error.message for error in schema.iter_errors(data)] == []


# ---- documents found in the wild

FOUND = sorted(MERGEKIT.glob("*.yaml"))


@pytest.mark.real
@pytest.mark.skipif(not FOUND, reason="the collection of mergekit configs is not beside the project")
@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_a_mergekit_config_is_a_recipe_or_refused_with_reasons(path: Path, schema: Draft202012Validator) -> None:
    try:
        recipe = load_recipe(path)
    except RecipeError as error:
        assert str(error).startswith(str(path))
        return
    assert recipe.method.name in path.stem
    assert schema.is_valid(yaml.safe_load(path.read_text("utf-8")))


@pytest.mark.parametrize("method", ["ties", "dare_linear", "della", "breadcrumbs", "multislerp", "sce", "ram"])
def test_a_base_listed_alone_needs_no_weight(method: str) -> None:
    """As in mergekit: its task vector is zero."""
    recipe = parse_recipe(f"merge_method: {method}\nbase_model: org/a\nmodels: [{{model: org/a}}]")
    assert [str(source.ref) for source in recipe.models] == ["org/a"]
    assert "there is no model besides the base org/a: the output is the base" in recipe.warnings


def test_a_base_listed_alone_is_the_output(tmp_path: Path) -> None:
    """As people write it to have an adapter merged into its base."""
    recipe = parse_recipe(
        "merge_method: task_arithmetic\nbase_model: org/a\nmodels: [{model: org/a}]\nparameters: {weight: 1}"
    )
    assert [str(source.ref) for source in recipe.models] == ["org/a"]
    assert recipe.warnings == ("there is no model besides the base org/a: the output is the base",)
