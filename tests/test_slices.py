"""Slices and modules: stacks of layers, and parts of models that are merged in their own way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import transformers
from checkpoints import write_checkpoint
from tiny_architectures import build

import ctl_merge
from ctl_merge.errors import MismatchError, RecipeError
from ctl_merge.merging import Merge

LAYERS = {"llama": 3, "qwen3": 3, "gemma2": 3, "gpt2": 3, "gpt_neox": 3, "mixtral": 3, "qwen3_next": 4}
IDS = torch.arange(3, 43).view(1, -1)


def parse(text: str, folder: Path) -> ctl_merge.Recipe:
    return ctl_merge.parse_recipe(dedent(text), relative_to=folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with two models, `a` and `b`, of an architecture."""
    folder = tmp_path_factory.mktemp("models")

    def made(kind: str) -> Path:
        for number, name in enumerate("ab"):
            if not (folder / kind / name).exists():
                build(kind, number).save_pretrained(folder / kind / name)
        return folder / kind

    return made


def run(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", LAYERS)
def test_a_stack_is_what_its_layers_make_by_hand(kind: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    """a's first two layers, then all but the first of b: as the models' own forward runs those modules."""
    folder, depth = models(kind), LAYERS[kind]
    recipe = parse(
        f"""
        merge_method: passthrough
        slices:
          - sources: [{{model: a, layer_range: [0, 2]}}]
          - sources: [{{model: b, layer_range: [1, {depth}]}}]
        """,
        folder,
    )
    found, told = transformers.AutoModelForCausalLM.from_pretrained(
        ctl_merge.merge(recipe, tmp_path / "out").folder, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert torch.equal(run(found), run(by_hand(folder, [("a", 0), ("a", 1), *(("b", i) for i in range(1, depth))])))
    start = IDS[:, :6]  # with a cache, whose places are the layers' numbers
    generated = found.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=2, do_sample=False)
    for _ in range(generated.shape[1] - 6):
        start = torch.cat([start, found(input_ids=start, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, start)


def by_hand(folder: Path, layers: list[tuple[str, int]]) -> Any:
    """Modules of loaded models put into one list; embeddings are a's, what follows the layers is b's."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    own = {name: load(folder / name) for name in "ab"}
    inner = {name: getattr(m, m.base_model_prefix) for name, m in own.items()}
    holder = "h" if hasattr(inner["a"], "h") else "layers"
    blocks = [getattr(inner[name], holder)[i] for name, i in layers]
    for number, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    result = own["a"]
    kinds = getattr(result.config, "layer_types", None)
    if kinds:
        result.config.layer_types = [kinds[i] for _, i in layers]
    setattr(inner["a"], holder, torch.nn.ModuleList(blocks))
    result.config.num_hidden_layers = len(blocks)
    for name in ("norm", "ln_f", "final_layer_norm"):
        if hasattr(inner["a"], name):
            setattr(inner["a"], name, getattr(inner["b"], name))
    if not result.config.tie_word_embeddings:
        result.lm_head = own["b"].lm_head
    return result


@pytest.fixture
def family(tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Three llamas of four layers, one tensor a layer: base, a, b. Written beside the test's recipes."""
    generator = torch.Generator().manual_seed(0)
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)),
             "model.norm.weight", "lm_head.weight"]  # fmt: skip
    made = {m: {n: torch.randn(6, 4, generator=generator) for n in names} for m in ("base", "a", "b")}
    for model, tensors in made.items():
        write_checkpoint(tmp_path / model, tensors, {"num_hidden_layers": 4})
    return made


def layer(index: int) -> str:
    return f"model.layers.{index}.mlp.up_proj.weight"


def test_sources_of_a_slice_are_merged_layer_by_layer_with_gradients_within_the_slice(
    family: Mapping[str, Mapping[str, torch.Tensor]], tmp_path: Path
) -> None:
    merged = ctl_merge.open_merge(
        parse(
            """
            merge_method: linear
            slices:
              - sources:
                  - {model: a, layer_range: [0, 3], parameters: {weight: [1.0, 3.0]}}
                  - {model: b, layer_range: [1, 4], parameters: {weight: 1.0}}
              - sources:
                  - {model: a, layer_range: [3, 4], parameters: {weight: [1.0, 3.0]}}
                  - {model: b, layer_range: [0, 1], parameters: {weight: [{filter: norm, value: 5.0}, {value: 1.0}]}}
            """,
            tmp_path,
        )
    )
    a, b = family["a"], family["b"]
    wanted = {
        "model.embed_tokens.weight": (a["model.embed_tokens.weight"], b["model.embed_tokens.weight"], 1.0, 1.0),
        layer(0): (a[layer(0)], b[layer(1)], 1.0, 1.0),
        layer(1): (a[layer(1)], b[layer(2)], 2.0, 1.0),
        layer(2): (a[layer(2)], b[layer(3)], 3.0, 1.0),
        layer(3): (a[layer(3)], b[layer(0)], 3.0, 1.0),  # the only layer of its slice is the gradient's end
        "model.norm.weight": (a["model.norm.weight"], b["model.norm.weight"], 1.0, 5.0),
        "lm_head.weight": (a["lm_head.weight"], b["lm_head.weight"], 1.0, 1.0),
    }
    assert set(merged.tensors) == set(wanted)
    for name, (one, other, w, v) in wanted.items():
        expected = (w * one.double() + v * other.double()) / (w + v)
        torch.testing.assert_close(merged.read(name).double(), expected, rtol=0, atol=1e-6)


def test_task_vectors_of_a_slice_are_differences_from_the_layers_listed_of_the_base(
    family: Mapping[str, Mapping[str, torch.Tensor]], tmp_path: Path
) -> None:
    merged = ctl_merge.open_merge(
        parse(
            """
            merge_method: task_arithmetic
            base_model: base
            parameters: {lambda: 0.5}
            slices:
              - sources: [{model: base, layer_range: [0, 2]}, {model: a, layer_range: [2, 4], parameters: {weight: 1}}]
              - sources: [{model: a, layer_range: [0, 1], parameters: {weight: 1}}, {model: base, layer_range: [3, 4]}]
                parameters: {lambda: 2}
            """,
            tmp_path,
        )
    )
    assert merged.config["num_hidden_layers"] == 3
    base, a = family["base"], family["a"]
    for name, low, high, scale in ((layer(0), 0, 2, 0.5), (layer(1), 1, 3, 0.5), (layer(2), 3, 0, 2.0)):
        expected = base[layer(low)] + scale * (a[layer(high)].double() - base[layer(low)])
        torch.testing.assert_close(merged.read(name).double(), expected, rtol=0, atol=1e-6)


def test_one_slice_of_all_layers_is_the_merge_of_the_whole_models(
    family: Mapping[str, Mapping[str, torch.Tensor]], tmp_path: Path
) -> None:
    whole = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: [0, 1]}}]"
    sliced = (
        "slices: [{sources: [{model: a, layer_range: [0, 4], parameters: {weight: 1}}, "
        "{model: b, layer_range: [0, 4], parameters: {weight: [0, 1]}}]}]"
    )
    one, other = (Merge(parse(f"merge_method: linear\n{text}", tmp_path)) for text in (whole, sliced))
    assert one.plan.tensors == other.plan.tensors
    assert one.plan.decisions == other.plan.decisions and not other.plan.changes


def test_lists_with_an_entry_for_each_layer_follow_and_kinds_are_written_out(tmp_path: Path) -> None:
    from ctl_merge.restacked_config import Run, restacked

    gemma = {"model_type": "gemma2", "num_hidden_layers": 4, "architectures": ["Gemma2ForCausalLM"]}
    changes = restacked(gemma, [Run(gemma, 0, 2), Run(gemma, 0, 3)], "model.layers", 4)
    kinds = ["sliding_attention", "full_attention"]  # gemma 2 alternates them by the layer's number
    assert changes == {("num_hidden_layers",): 5, ("layer_types",): [*kinds, *kinds, kinds[0]]}
    moe = {"num_hidden_layers": 3, "mlp_only_layers": [0, 2], "no_rope_layers": [1, 0, 1], "eos_token_id": [1, 2, 3]}
    changes = restacked(moe, [Run(moe, 1, 3), Run(moe, 0, 1)], "model.layers", 3)
    assert changes == {("mlp_only_layers",): [1, 2], ("no_rope_layers",): [0, 1, 1]}
    nested = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 2}}
    assert restacked(nested, [Run(nested, 0, 1)], "language_model.model.layers", 2) == {
        ("text_config", "num_hidden_layers"): 1
    }
    assert restacked(nested, [Run(nested, 0, 1)], "vision_tower.encoder.layers", 2) == {
        ("vision_config", "num_hidden_layers"): 1
    }
    t5 = {"num_layers": 2, "num_decoder_layers": 2}
    assert restacked(t5, [Run(t5, 0, 1)], "decoder.block", 2) == {("num_decoder_layers",): 1}


def test_modules_are_merged_in_their_own_way(models: Callable[[str], Path]) -> None:
    folder = models("llava")
    merged = ctl_merge.open_merge(
        parse(
            """
            merge_method: linear
            modules:
              vision_tower: {models: [{model: a, parameters: {weight: 1}}]}
              multi_modal_projector: {models: [{model: b, parameters: {weight: 1}}]}
              text_decoder:
                models: [{model: a, parameters: {weight: 1}}, {model: b}]
                parameters: {weight: 3}
            """,
            folder,
        )
    )
    from safetensors.torch import load_file

    a, b = (load_file(folder / name / "model.safetensors") for name in "ab")
    assert set(merged.tensors) == set(a)
    for name in a:
        share = 1.0 if "vision_tower" in name else 0.0 if "projector" in name else 0.25
        expected = share * a[name].double() + (1 - share) * b[name].double()
        torch.testing.assert_close(merged.read(name).double(), expected, rtol=1e-6, atol=1e-7)


def test_encoder_and_decoder_have_slices_of_their_own(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = models("t5")
    recipe = parse(
        """
        merge_method: passthrough
        modules:
          encoder: {slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}
          decoder:
            slices: [{sources: [{model: b, layer_range: [0, 2]}]}, {sources: [{model: a, layer_range: [1, 2]}]}]
          default: {models: [{model: a}]}
        """,
        folder,
    )
    out = ctl_merge.merge(recipe, tmp_path / "out").folder
    config = json.loads((out / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (1, 3)
    model, told = transformers.AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert torch.isfinite(model(input_ids=IDS, decoder_input_ids=IDS).logits).all()


WRONG = {
    "beyond": ("sources: [{model: a, layer_range: [2, 5]}]", "a has 4 layers .model.layers., which layer_range"),
    "uneven": (
        "sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]", "slice have as many layers"
    ),
    "empty": ("sources: [{model: a, layer_range: [2, 2]}]", "holds no layer"),
    "negative": ("sources: [{model: a, layer_range: [-1, 2]}]", "layers are counted from 0"),
    "revision": ("sources: [{model: a, revision: main, layer_range: [0, 2]}]", "model: org/name@revision"),
    "missing": ("sources: [{model: a}]", "layer_range` is missing"),
    "residual": ("{sources: [{model: a, layer_range: [0, 2]}], residual_weight: 1.0}", "no effect in mergekit"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_slices_are_refused(case: str, family: Any, tmp_path: Path) -> None:
    written, said = WRONG[case]
    with pytest.raises((RecipeError, MismatchError), match=said):
        Merge(parse(f"merge_method: passthrough\nslices:\n  - {written}\n", tmp_path))


def test_a_base_that_a_slice_does_not_list_and_two_layouts_at_once_are_refused(family: Any, tmp_path: Path) -> None:
    listed = "{model: a, layer_range: [0, 4], parameters: {weight: 1}}"
    text = f"merge_method: ties\nbase_model: base\nslices: [{{sources: [{listed}]}}]\n"
    with pytest.raises(RecipeError, match=r"line 3: the slice's base base is not among its sources: ties needs it"):
        parse(text, tmp_path)
    with pytest.raises(RecipeError, match="give one of `models`, `slices`, `modules`; there is `models` and `slices`"):
        parse(f"{text}models: [{{model: a}}]\n", tmp_path)


def test_modules_that_leave_something_out_or_do_not_exist_are_refused(models: Callable[[str], Path]) -> None:
    folder = models("llava")
    text = "merge_method: passthrough\nmodules:\n  vision_tower: {models: [{model: a}]}\n"
    with pytest.raises(MismatchError, match=r"no module of the recipe covers \d+ tensors of a, such as"):
        Merge(parse(text, folder))
    with pytest.raises(MismatchError, match="module 'audio': no tensor of a begins so"):
        Merge(parse(f"{text}  text_decoder: {{models: [{{model: a}}]}}\n  audio: {{models: [{{model: a}}]}}\n", folder))


def test_a_stack_that_its_class_does_not_load_is_refused(models: Callable[[str], Path]) -> None:
    """T5's first layer alone has the position biases of all."""
    text = """
        merge_method: passthrough
        modules:
          encoder: {models: [{model: a}]}
          decoder:
            slices: [{sources: [{model: a, layer_range: [0, 1]}]}, {sources: [{model: a, layer_range: [0, 1]}]}]
          default: {models: [{model: a}]}
        """
    with pytest.raises(
        MismatchError, match=r"at its new depth a T5ForConditionalGeneration has no place for decoder.block.1"
    ):
        Merge(parse(text, models("t5")))


def test_a_pattern_of_layers_that_the_class_does_not_leave_open_is_kept_or_refused(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    """A Jamba's kinds follow from the layers' numbers: every second one has attention."""
    folder = models("jamba")
    text = """
        merge_method: passthrough
        slices:
          - sources: [{{model: a, layer_range: [0, 4]}}]
          - sources: [{{model: b, layer_range: [{}, 4]}}]
        """
    with pytest.raises(MismatchError, match="a jamba makes the kind of each layer .* layer 4 of this stack .* full_"):
        Merge(parse(text.format(1), folder))
    _, told = transformers.AutoModelForCausalLM.from_pretrained(
        ctl_merge.merge(parse(text.format(2), folder), tmp_path / "out").folder, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]


def test_a_base_gives_a_passthrough_its_config(family: Any, tmp_path: Path) -> None:
    """As in mergekit, whether or not it has a slice; of whole models it would be a second input."""
    text = """
        merge_method: passthrough
        base_model: base
        slices:
          - sources: [{model: a, layer_range: [0, 3]}]
          - sources: [{model: b, layer_range: [2, 4]}]
        """
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    merge = Merge(parse(text, tmp_path))
    assert merge.merged.config["rope_theta"] == 5e5 and merge.merged.config["num_hidden_layers"] == 5
    for number, (model, index) in enumerate([("a", 0), ("a", 1), ("a", 2), ("b", 2), ("b", 3)]):
        assert torch.equal(merge.merged.read(layer(number)), family[model][layer(index)])
    with pytest.raises(RecipeError, match="passthrough takes no `base_model`: remove it"):
        parse("merge_method: passthrough\nbase_model: base\nmodels: [{model: a}]", tmp_path)


def test_several_stacks_need_modules(models: Callable[[str], Path]) -> None:
    with pytest.raises(MismatchError, match=r"several stacks of layers \(decoder.block, encoder.block\)"):
        Merge(parse("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]", models("t5")))


def test_a_head_of_its_own_unties_a_stack_whose_first_model_ties(models: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = models("gemma2")
    for name in "ab":
        (tmp_path / name).mkdir()
        for file in (folder / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "b" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    text = """
        merge_method: passthrough
        slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: b, layer_range: [2, 3]}]}]
        """
    out = ctl_merge.merge(parse(text, tmp_path), tmp_path / "out").folder
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


def test_a_probe_refuses_a_stack_and_takes_slices_that_stay_in_place(family: Any, tmp_path: Path) -> None:
    from ctl_merge.roles import roles

    one, other = "{model: a, layer_range: [%d, %d], parameters: {weight: 1}}", "{model: base, layer_range: [%d, %d]}"
    text = "merge_method: task_arithmetic\nbase_model: base\nslices:\n"
    spans = [(0, 1), (1, 4)]
    kept = Merge(parse(text + "".join(f"  - sources: [{one % s}, {other % s}]\n" for s in spans), tmp_path))
    base, parents = roles(kept, None)
    assert list(parents) == ["a"]
    assert torch.equal(parents["a"].read(layer(2)), family["a"][layer(2)])
    assert torch.equal(base.read(layer(2)), family["base"][layer(2)])
    moved = Merge(parse(text + f"  - sources: [{one % (1, 3)}, {other % (1, 3)}]\n", tmp_path))
    with pytest.raises(RecipeError, match="its slices move layers"):
        roles(moved, None)


def test_a_head_that_is_tied_is_not_missing(models: Callable[[str], Path]) -> None:
    slices = "slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: b, layer_range: [1, 2]}]}]"
    opened = Merge(parse(f"merge_method: passthrough\n{slices}\n", models("gemma2")))
    assert not opened.plan.warnings
    assert opened.plan.decisions[0] == "model.layers has 3 layers: a[0:2], b[1:2]"
