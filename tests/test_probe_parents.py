"""What a merge that lies in a folder was made from, by its recipe or its model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

import ctl_merge
from ctl_merge.errors import CtlMergeError, ProbeError
from ctl_merge.probing.parents import parents_of

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
BASE, CYCLE, SHIFT = (str(QUICKSTART / name) for name in ("base", "cycle", "shift"))
SMALL = {"sequences": 2, "length": 16}
RECIPE = {
    "merge_method": "task_arithmetic", "base_model": BASE,
    "models": [{"model": CYCLE, "parameters": {"weight": 0.5}}, {"model": SHIFT, "parameters": {"weight": 0.5}}],
}  # fmt: skip
MERGEKIT = """---
base_model:
- org/one
- org/base
library_name: transformers
tags:
- mergekit
- merge

---
# merged

This is a merge of pre-trained language models created using mergekit.

### Configuration

The following YAML configuration was used to produce this model:

```yaml
{recipe}
```
"""


def with_card(folder: Path, recipe: str = "", card: str = MERGEKIT) -> Path:
    (folder / "README.md").write_text(card.replace("{recipe}", recipe))
    return folder


def test_the_yaml_in_a_mergekit_card_names_them(tmp_path: Path) -> None:
    assert parents_of(with_card(tmp_path, yaml.safe_dump(RECIPE)), [], None) == ([CYCLE, SHIFT], BASE)


@pytest.mark.parametrize("where", ["beside the merge", "in the working directory"])
def test_our_own_card_names_them(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells no path: local models are looked for by name."""
    folder = ctl_merge.merge(ctl_merge.parse_recipe(yaml.safe_dump(RECIPE)), tmp_path / "merged").folder
    (folder / "ctl_merge_recipe.yaml").unlink()
    if where == "beside the merge":
        for model in (BASE, CYCLE, SHIFT):
            (tmp_path / Path(model).name).symlink_to(model)
    else:
        monkeypatch.chdir(Path(BASE).parent)
    models, base = parents_of(folder, [], None)
    assert [Path(m).resolve() for m in (*models, base)] == [Path(m).resolve() for m in (CYCLE, SHIFT, BASE)]
    found = ctl_merge.probe_merged(str(folder), **SMALL)
    assert found.data["parents"] == ["cycle", "shift"]
    assert found.data["merges"][0]["effective_weight"] == pytest.approx({"cycle": 0.5, "shift": 0.5}, abs=1e-4)


def test_a_file_is_asked_before_the_card(tmp_path: Path) -> None:
    own = {**RECIPE, "models": RECIPE["models"][:1]}
    (tmp_path / "mergekit_config.yml").write_text(yaml.safe_dump(own))
    assert parents_of(with_card(tmp_path, yaml.safe_dump(RECIPE)), [], None) == ([CYCLE], BASE)


def test_a_recipe_that_cannot_be_read_leaves_the_word_to_the_card(tmp_path: Path) -> None:
    (tmp_path / "mergekit_config.yml").write_text("merge_method: no_such\n")
    assert parents_of(with_card(tmp_path, yaml.safe_dump(RECIPE)), [], None) == ([CYCLE, SHIFT], BASE)


def test_models_beside_the_merge_are_found_there(tmp_path: Path) -> None:
    for name in ("base", "own"):
        (tmp_path / name).mkdir()
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "own"}]}
    recipe["models"][0]["parameters"] = {"weight": 1}
    found = parents_of(with_card(tmp_path, yaml.safe_dump(recipe)), [], None)
    assert found == ([str(tmp_path / "own")], str(tmp_path / "base"))


def test_what_is_given_stays(tmp_path: Path) -> None:
    folder = with_card(tmp_path, yaml.safe_dump(RECIPE))
    assert parents_of(folder, ["org/mine"], None) == (["org/mine"], BASE)
    assert parents_of(folder, [], SHIFT) == ([CYCLE], SHIFT)


def test_the_base_of_a_slerp_is_a_parent_where_another_base_is_given(tmp_path: Path) -> None:
    recipe = {"merge_method": "slerp", "base_model": CYCLE, "models": [{"model": SHIFT}], "parameters": {"t": 0.5}}
    assert sorted(parents_of(with_card(tmp_path, yaml.safe_dump(recipe)), [], BASE)[0]) == [CYCLE, SHIFT]


def test_a_list_of_models_needs_to_know_the_base(tmp_path: Path) -> None:
    folder = with_card(tmp_path)
    assert parents_of(folder, [], "org/base") == (["org/one"], "org/base")
    with pytest.raises(ProbeError, match=r"lists org/one, org/base, without saying which .*: give --base C"):
        parents_of(folder, [], None)


@pytest.mark.parametrize(
    "card, reason",
    [
        (None, "there is no recipe and no README.md in it"),
        ("---\nbase_model: [1, {a: b}]\n---\n", "does not say"),
        ("---\nbase_model: *nothing\n---\n", "the metadata of README.md is not YAML: found undefined alias"),
        ("---\nbase_model: " + "[" * 5000 + "\n---\n", "the metadata of README.md is not YAML"),
        ("no metadata\n---\nbase_model: org/a\n---\n", "does not say"),
        (MERGEKIT.replace("{recipe}", "merge_method: no_such\nmodels: [{model: org/a}]"), "no_such"),
        (MERGEKIT.replace("{recipe}", "merge_method: linear\nmodels: [{model: org/a, parameters: {weight: 1}}]"),
         "README.md names no base_model"),
        ("\x00\xff" * 1000, "does not say"),
        ("---\nbase_model: []\n---\n# A merge\n", "its README.md names no models"),
    ],
    ids=["none", "no names", "broken", "deep", "no front matter", "unknown method", "no base", "noise", "empty"],
)  # fmt: skip
def test_a_merge_that_does_not_say_is_told_with_what_was_found(card: str | None, reason: str, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card, "latin-1")
    with pytest.raises(ProbeError, match=f"(?s){reason}.*give --"):
        parents_of(tmp_path, [], None)


def test_models_that_are_gone_are_told_with_where_their_names_come_from(tmp_path: Path) -> None:
    folder = ctl_merge.merge(ctl_merge.parse_recipe(yaml.safe_dump(RECIPE)), tmp_path / "merged").folder
    text = yaml.safe_dump(RECIPE).replace(str(QUICKSTART), str(tmp_path / "gone"))
    (folder / "ctl_merge_recipe.yaml").unlink()
    with pytest.raises(CtlMergeError, match="give --"):
        ctl_merge.probe_merged(str(with_card(folder, text)), **SMALL)


def test_parents_of_the_same_name_are_kept_apart(tmp_path: Path) -> None:
    folder = ctl_merge.merge(ctl_merge.parse_recipe(yaml.safe_dump(RECIPE)), tmp_path / "merged").folder
    parents = []
    for name, source in (("one", CYCLE), ("two", SHIFT)):
        shutil.copytree(source, tmp_path / name / "model")
        parents.append(str(tmp_path / name / "model"))
    found = ctl_merge.probe_merged(str(folder), parents, BASE, **SMALL)
    short = ["one/model", "two/model"]
    assert found.data["parents"] == short
    assert found.data["merges"][0]["effective_weight"] == pytest.approx(dict.fromkeys(short, 0.5), abs=1e-4)


def test_a_merge_is_not_its_own_parent(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="no parents besides itself"):
        ctl_merge.probe_merged(CYCLE, [CYCLE], BASE, **SMALL)
