"""Which value a parameter has for which tensor: gradients, filters and precedence, read off merged weights.

The base is zero and the model one everywhere, so that task arithmetic's merged tensor *is* the weight it was given.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint

import ctl_merge
from ctl_merge.errors import MismatchError, RecipeError
from ctl_merge.merged import MergedCheckpoint

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj.weight"


def mlp(layer: int) -> str:
    return f"model.layers.{layer}.mlp.up_proj.weight"


def constant(value: float, layers: int) -> dict[str, torch.Tensor]:
    """A Llama of so many layers, all weights the same."""
    names = [EMBEDDING, *(name(layer) for layer in range(layers) for name in (attention, mlp)), NORM, HEAD]
    return {name: torch.full((2, 2), value) for name in names}


def open_merge(
    folder: Path, method: str, own: list[Mapping[str, Any]], shared: Mapping[str, Any] | None = None, layers: int = 4
) -> MergedCheckpoint:
    """Merge a base of zeros and, for each item of `own`, a model of ones with these parameters."""
    config = {"num_hidden_layers": layers}
    base = write_checkpoint(folder / "base", constant(0.0, layers), config)
    models = [(write_checkpoint(folder / str(i), constant(1.0, layers), config), p) for i, p in enumerate(own)]
    return ctl_merge.open_merge(ctl_merge.parse_recipe(recipe_text(method, models, base, shared)))


def values(merged: MergedCheckpoint) -> dict[str, float]:
    """The one number in each merged tensor."""
    tensors = {name: merged.read(name) for name in merged}
    assert all(len(tensor.unique()) == 1 for tensor in tensors.values())
    return {name: round(tensor[0, 0].item(), 6) for name, tensor in tensors.items()}


def weights(folder: Path, weight: Any, shared: Mapping[str, Any] | None = None, layers: int = 4) -> dict[str, float]:
    """The weight that each tensor of one model was given."""
    return values(open_merge(folder, "task_arithmetic", [{"weight": weight}], shared, layers))


# ---- gradients


@pytest.mark.parametrize(
    "gradient, expected",
    [
        ([0.0, 1.0], [0, 1 / 3, 2 / 3, 1]),
        ([1.0, 0.0, 1.0], [1, 1 / 3, 1 / 3, 1]),  # the anchors lie at layers 0, 1.5 and 3
        ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]),  # one anchor a layer: no interpolation
        ([0.0, 1.0, 0.0, 1.0, 0.0], [0, 2 / 3, 2 / 3, 0]),  # layers at 0, 4/3, 8/3 and 4 of the anchors
        ([0.7], [0.7, 0.7, 0.7, 0.7]),
        ([1, 0], [1, 2 / 3, 1 / 3, 0]),
    ],
)
def test_a_list_is_interpolated_over_the_layers(tmp_path: Path, gradient: list[float], expected: list[float]):
    found = weights(tmp_path, gradient)
    for layer in range(4):
        assert found[attention(layer)] == found[mlp(layer)] == pytest.approx(expected[layer], abs=1e-6)


def test_tensors_outside_of_the_layers_take_the_start_of_a_gradient(tmp_path: Path):
    """The head too, which lies after the last layer: mergekit's rule, and a trap worth knowing."""
    found = weights(tmp_path, [0.25, 0.75])
    assert [found[EMBEDDING], found[NORM], found[HEAD]] == [0.25, 0.25, 0.25]


def test_the_only_layer_takes_the_end_of_a_gradient(tmp_path: Path):
    found = weights(tmp_path, [0.25, 0.75], layers=1)
    assert found[attention(0)] == 0.75 and found[EMBEDDING] == 0.25


def test_layers_are_counted_as_numbers(tmp_path: Path):
    """Layer 10 of 12 lies after layer 2, though its name sorts before."""
    found = weights(tmp_path, [0.0, 11.0], layers=12)
    assert [found[attention(layer)] for layer in range(12)] == pytest.approx(range(12), abs=1e-5)


@pytest.mark.parametrize("flags", [[False, True], [0, 1]])
def test_a_list_of_flags_is_cut_into_steps(tmp_path: Path, flags: list[bool]):
    """values[int(t (len - 1))]: of two flags, the second holds for the last layer only."""
    merged = open_merge(tmp_path, "task_arithmetic", [{"weight": 1.0}, {"weight": 1.0}], {"normalize": flags})
    found = values(merged)
    assert [found[attention(layer)] for layer in range(4)] == [2, 2, 2, 1]
    assert found[EMBEDDING] == found[HEAD] == 2


def test_a_list_of_words_is_cut_into_steps(tmp_path: Path):
    merged = open_merge(tmp_path, "ties", [{"weight": 1.0}], {"elect": ["weighted", "unweighted", "count"]})
    found = [merged.plan.tensors[attention(layer)].parameters["elect"] for layer in range(4)]
    assert found == ["weighted", "weighted", "unweighted", "count"]  # t · 2 = 0, 2/3, 4/3, 2


def test_shared_parameters_have_gradients_too(tmp_path: Path):
    found = values(open_merge(tmp_path, "task_arithmetic", [{"weight": 0.5}], {"lambda": [0.0, 3.0]}))
    assert [found[mlp(layer)] for layer in range(4)] == [0, 0.5, 1, 1.5]


# ---- filters


def test_a_filter_is_a_part_of_the_tensors_name(tmp_path: Path):
    found = weights(tmp_path, [{"filter": "self_attn", "value": 0.2}, {"filter": "mlp", "value": 0.4}, {"value": 0.6}])
    assert {found[attention(layer)] for layer in range(4)} == {0.2}
    assert {found[mlp(layer)] for layer in range(4)} == {0.4}
    assert found[EMBEDDING] == found[NORM] == found[HEAD] == 0.6


def test_the_first_matching_choice_wins(tmp_path: Path):
    found = weights(
        tmp_path, [{"filter": "layers.1", "value": 0.1}, {"filter": "mlp", "value": 0.2}, {"filter": "*", "value": 0.3}]
    )
    assert (found[mlp(1)], found[attention(1)], found[mlp(0)], found[attention(0)]) == (0.1, 0.1, 0.2, 0.3)


def test_a_choice_for_every_tensor_hides_those_after_it(tmp_path: Path):
    found = weights(tmp_path, [{"filter": "*", "value": 0.3}, {"filter": "mlp", "value": 0.2}])
    assert set(found.values()) == {0.3}


def test_a_filter_with_a_gradient(tmp_path: Path):
    """mergekit's SLERP example: a gradient for each part, a number for the rest."""
    found = weights(
        tmp_path, [{"filter": "self_attn", "value": [0.0, 0.3]}, {"filter": "mlp", "value": [0.3, 0.0]}, {"value": 0.5}]
    )
    assert [found[attention(layer)] for layer in range(4)] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [found[mlp(layer)] for layer in range(4)] == pytest.approx([0.3, 0.2, 0.1, 0])
    assert found[HEAD] == 0.5


def test_a_bare_number_may_end_a_list_of_choices(tmp_path: Path):
    found = weights(tmp_path, [{"filter": "mlp", "value": 0.2}, 0.9])
    assert (found[mlp(3)], found[attention(3)]) == (0.2, 0.9)


def test_filters_see_upper_and_lower_case(tmp_path: Path):
    found = weights(tmp_path, [{"filter": "MLP", "value": 0.2}, {"value": 0.9}])
    assert set(found.values()) == {0.9}


# ---- precedence


def test_the_models_own_value_wins_over_the_recipes_and_that_over_the_default(tmp_path: Path):
    own: list[Mapping[str, Any]] = [{"weight": 0.5, "density": 0.25}, {}]
    merged = open_merge(tmp_path, "ties", own, {"weight": 2.0, "density": 0.75})
    parameters = merged.plan.tensors[mlp(0)].parameters
    assert parameters["weight"] == (0.5, 2.0) and parameters["density"] == (0.25, 0.75)
    merged = open_merge(tmp_path, "ties", [{"weight": 1.0, "density": 0.5}, {"weight": 1.0}])
    assert merged.plan.tensors[mlp(0)].parameters["density"] == (0.5, 1.0)


def test_where_no_choice_of_the_model_matches_the_recipes_value_holds(tmp_path: Path):
    found = weights(tmp_path, {"filter": "mlp", "value": 0.2}, {"weight": [0.4, 0.7]})
    assert {found[mlp(layer)] for layer in range(4)} == {0.2}
    assert [found[attention(layer)] for layer in range(4)] == pytest.approx([0.4, 0.5, 0.6, 0.7])


def test_where_nothing_matches_the_default_holds(tmp_path: Path):
    own = [{"weight": 1.0, "density": {"filter": "self_attn", "value": 0.2}}]
    merged = open_merge(tmp_path, "ties", own, {"density": {"filter": "mlp", "value": 0.4}})
    found = [merged.plan.tensors[name].parameters["density"] for name in (attention(0), mlp(0), NORM)]
    assert found == [(0.2,), (0.4,), (1.0,)]


def test_where_nothing_matches_and_there_is_no_default_the_tensor_is_named(tmp_path: Path):
    with pytest.raises(MismatchError, match=r"`weight`.*lm_head\.weight.*no default"):
        weights(tmp_path, {"filter": "layers", "value": 0.2})


def test_each_model_has_its_own_choices(tmp_path: Path):
    own = [{"weight": {"filter": "mlp", "value": 1.0}}, {"weight": [{"filter": "self_attn", "value": 10.0}]}]
    found = values(open_merge(tmp_path, "task_arithmetic", own, {"weight": 100.0}))
    assert (found[mlp(0)], found[attention(0)], found[HEAD]) == (101, 110, 200)


# ---- what is refused


def test_a_shared_parameter_below_a_model_is_refused(tmp_path: Path):
    """mergekit reads it nowhere and says nothing."""
    with pytest.raises(RecipeError, match="'lambda' is shared by all models"):
        open_merge(tmp_path, "task_arithmetic", [{"weight": 1.0, "lambda": 0.5}])


@pytest.mark.parametrize(
    "weight, message",
    [
        ([], "empty gradient"),
        ([{"filter": "mlp"}], "`value` is missing"),
        ({"valu": 1.0}, "unknown key 'valu'"),
        ({"filter": 3, "value": 1.0}, "filter is part of a tensor's name"),
        ("half", "`weight`: input should be a valid number"),
        ([0.1, "half"], "`weight`: input should be a valid number"),
        (float("nan"), "`weight`: input should be a finite number"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(tmp_path: Path, weight: Any, message: str):
    with pytest.raises(RecipeError, match=message):
        weights(tmp_path, weight)


@pytest.mark.parametrize("density", [-0.1, 1.1])
def test_a_density_is_a_share(tmp_path: Path, density: float):
    with pytest.raises(RecipeError, match="`density`"):
        open_merge(tmp_path, "ties", [{"weight": 1.0, "density": density}])


def test_a_statistic_of_the_whole_model_needs_the_same_parameters_everywhere(tmp_path: Path):
    own = [{"weight": 1.0, "density": [0.2, 0.4]}]
    with pytest.raises(MismatchError, match="trim: model"):
        open_merge(tmp_path, "ties", own, {"trim": "model"})
