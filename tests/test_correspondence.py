"""Which tensors belong together: tied or stored apart, with other names, dtypes, rows; and what is refused."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import recipe_text, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny_architectures import VOCABULARY, WIDTH, build, finetune, load_whole
from torch import Tensor
from transformers import PreTrainedModel

import ctl_merge
from ctl_merge.errors import CheckpointError, MismatchError
from ctl_merge.merging import MergeResult
from ctl_merge.model_config import patch_config

ROOT = Path(ctl_merge.__file__).parent.parent
WEIGHTS, HEAD, EMBEDDING = "model.safetensors", "lm_head.weight", "model.embed_tokens.weight"
State = dict[str, Tensor]
Merged = Callable[..., MergeResult]


@pytest.fixture
def llamas(tmp_path: Path) -> tuple[Path, Path]:
    """A base and its finetune, with heads of their own."""
    return saved_pair(tmp_path, "llama")


def saved_pair(folder: Path, name: str, **changes: Any) -> tuple[Path, Path]:
    model = build(name, **changes)
    model.save_pretrained(folder / "base")
    finetune(model, seed=1)
    model.save_pretrained(folder / "expert")
    return folder / "base", folder / "expert"


def state(folder: Path) -> State:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def store(folder: Path, tensors: State) -> None:
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def configure(folder: Path, **changes: Any) -> None:
    """Change keys of a config; None removes one."""
    changed = {key: value for key, value in {**config(folder), **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(changed))


def without_prefix(tensors: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def halfway(base: Tensor, expert: Tensor) -> Tensor:
    return (base.double() + 0.5 * (expert.double() - base.double())).to(base.dtype)


def by_hand(base: State, expert: State) -> State:
    return {name: halfway(tensor, expert[name]) for name, tensor in base.items()}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=torch.arange(12).view(1, 12)).logits


# ---- tied embeddings

STORED = ("absent", "equal", "apart")


def write_with_head(folder: Path, model: PreTrainedModel, head: str, stated: bool | None) -> None:
    """Save a tied model's body with its head left out, equal to the embedding, or another; `stated` in the config."""
    model.save_pretrained(folder)
    body = state(folder)
    body.pop(HEAD, None)
    noise = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(len(folder.name)))
    heads = {"absent": {}, "equal": {HEAD: body[EMBEDDING]}, "apart": {HEAD: body[EMBEDDING] + 0.1 * noise}}
    store(folder, body | heads[head])
    configure(folder, tie_word_embeddings=stated)


def untied(folder: Path) -> State:
    """The state that a model computes with: its head is what is stored, else the embedding."""
    stored = state(folder)
    return {HEAD: stored[EMBEDDING], **stored}


@pytest.mark.parametrize(("name", "stated"), [("llama", True), ("llama", False), ("llama", None), ("gemma2", None)])
@pytest.mark.parametrize("base_head", STORED)
@pytest.mark.parametrize("expert_head", STORED)
def test_a_head_is_what_is_stored_or_the_embedding_where_the_config_ties(
    name: str, stated: bool | None, base_head: str, expert_head: str, tmp_path: Path, merged: Merged
) -> None:
    ties = bool(stated) or (stated is None and name == "gemma2")  # the default of the model type
    base, expert = tmp_path / "base", tmp_path / "expert"
    model = build(name)
    write_with_head(base, model, base_head, stated)
    finetune(model, seed=1)
    write_with_head(expert, model, expert_head, stated)
    if not ties and "absent" in (base_head, expert_head):
        if base_head != expert_head:
            with pytest.raises(MismatchError, match=HEAD):
                merged(base, expert)
        return
    output = merged(base, expert).folder
    apart = not ties or "apart" in (base_head, expert_head)
    assert (HEAD in state(output)) == apart
    if ties and apart:
        assert config(output)["tie_word_embeddings"] is False
    else:
        assert (output / "config.json").read_bytes() == (base / "config.json").read_bytes()

    reference = build(name, tie_word_embeddings=False)
    reference.load_state_dict(by_hand(untied(base), untied(expert)))
    loaded = load_whole(name, output)
    assert_same(loaded.state_dict(), reference.state_dict())
    torch.testing.assert_close(logits(loaded), logits(reference))


@pytest.mark.parametrize(("base_ties", "heads"), [(True, ("absent", "apart")), (False, ("apart", "absent"))])
def test_a_model_that_ties_merges_with_one_that_does_not(
    base_ties: bool, heads: tuple[str, str], tmp_path: Path, merged: Merged
) -> None:
    base, expert = tmp_path / "base", tmp_path / "expert"
    write_with_head(base, build("llama"), heads[0], base_ties)
    write_with_head(expert, build("llama", seed=1), heads[1], not base_ties)
    output = merged(base, expert).folder
    assert_same(load_whole("llama", output).state_dict(), by_hand(untied(base), untied(expert)))
    assert config(output)["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", ["bert", "t5", "bart", "whisper", "gemma3"])
def test_copies_of_tied_tensors_in_one_model_are_matched_and_not_written(
    name: str, tmp_path: Path, merged: Merged
) -> None:
    base, expert = saved_pair(tmp_path, name)
    model = load_whole(name, expert)
    copies = {target: model.state_dict()[target] for target in model.all_tied_weights_keys}
    store(expert, state(expert) | copies)
    output = merged(base, expert).folder
    assert_same(state(output), by_hand(state(base), state(expert)))
    load_whole(name, output)


# ---- names


def test_a_tied_finetune_saved_without_its_head_class_is_matched(tmp_path: Path, merged: Merged) -> None:
    base, expert = saved_pair(tmp_path, "llama", tie_word_embeddings=True)
    model = load_whole("llama", expert)
    model.model.save_pretrained(tmp_path / "bare")
    assert "layers.0.mlp.up_proj.weight" in state(tmp_path / "bare")

    result = merged(base, tmp_path / "bare")
    assert_same(state(result.folder), by_hand(state(base), state(expert)))
    load_whole("llama", result.folder)
    assert any("matched by module" in decision for decision in result.manifest["decisions"])

    result = merged(tmp_path / "bare", base, output="other way")
    assert_same(state(result.folder), without_prefix(by_hand(state(expert), state(base)), "model."))


def test_a_finetune_saved_without_the_head_it_has_is_refused(llamas: tuple[Path, Path], tmp_path: Path, merged: Merged):
    base, expert = llamas
    load_whole("llama", expert).model.save_pretrained(tmp_path / "bare")
    with pytest.raises(MismatchError, match=r"bare lacks 1 tensors that .*base has: lm_head\.weight"):
        merged(base, tmp_path / "bare")
    with pytest.raises(MismatchError, match=r"base has 1 tensors that .*bare lacks: lm_head\.weight"):
        merged(tmp_path / "bare", base)
    output = merged(base, tmp_path / "bare", missing="base").folder
    assert_same(state(output), by_hand(state(base), state(expert) | {HEAD: state(base)[HEAD]}))


def test_names_of_an_older_and_a_newer_format_are_matched(tmp_path: Path, merged: Merged) -> None:
    base, expert = saved_pair(tmp_path, "gpt_neox")
    load_whole("gpt_neox", expert).save_pretrained(tmp_path / "newer", save_original_format=False)
    assert "embed_out.weight" in state(expert) and "lm_head.weight" in state(tmp_path / "newer")
    output = merged(base, tmp_path / "newer").folder
    assert_same(state(output), by_hand(state(base), state(expert)))
    load_whole("gpt_neox", output)


@pytest.mark.parametrize("head", ["absent", "equal", "apart"])
def test_gpt2_as_the_hub_has_it_merges_with_its_finetunes(head: str, tmp_path: Path, merged: Merged) -> None:
    """The original names its tensors without a prefix and stores causal masks; finetunes have neither."""
    base, expert = saved_pair(tmp_path, "gpt2")
    embedding = state(expert)["transformer.wte.weight"]
    heads = {"absent": {}, "equal": {HEAD: embedding}, "apart": {HEAD: embedding + 1}}
    expected = by_hand(state(base), state(expert))
    if head == "apart":
        expected[HEAD] = halfway(state(base)["transformer.wte.weight"], embedding + 1)
    masks = {f"h.{i}.attn.bias": torch.tril(torch.ones(1, 1, 64, 64)) for i in range(3)}
    store(base, without_prefix(state(base), "transformer.") | masks)
    store(expert, state(expert) | heads[head])
    output = merged(base, expert).folder
    assert_same(state(output), without_prefix(expected, "transformer."))
    load_whole("gpt2", output)


def test_bert_as_the_hub_has_it_merges_with_its_finetunes(tmp_path: Path, merged: Merged) -> None:
    """The original calls the weights of its norms gamma and beta."""

    def older(tensors: State) -> State:
        return {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in tensors.items()
        }

    base, expert = saved_pair(tmp_path, "bert")
    expected = older(by_hand(state(base), state(expert)))
    store(base, older(state(base)))
    output = merged(base, expert).folder
    assert_same(state(output), expected)
    load_whole("bert", output)


def test_experts_stored_apart_and_stacked_do_not_mix(tmp_path: Path, merged: Merged) -> None:
    base, expert = saved_pair(tmp_path, "mixtral")
    for folder in (base, expert):
        load_whole("mixtral", folder).save_pretrained(
            folder.with_name(f"stacked {folder.name}"), save_original_format=False
        )
    stacked_base, stacked_expert = (tmp_path / f"stacked {name}" for name in ("base", "expert"))
    with pytest.raises(MismatchError, match=r"stacked expert lacks 36 tensors .*experts\.0\.w1"):
        merged(base, stacked_expert)
    output = merged(stacked_base, stacked_expert).folder
    assert_same(state(output), by_hand(state(stacked_base), state(stacked_expert)))
    load_whole("mixtral", output)


# ---- buffers

FREQUENCIES = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.arange(8.0) for i in range(3)}


@pytest.mark.parametrize("holder", ["base", "expert"])
def test_buffers_that_one_model_stores_and_every_model_computes_are_left_out_and_named(
    holder: str, llamas: tuple[Path, Path], tmp_path: Path, merged: Merged
) -> None:
    base, expert = llamas
    expected = by_hand(state(base), state(expert))
    store(tmp_path / holder, state(tmp_path / holder) | FREQUENCIES)
    result = merged(base, expert)
    assert_same(state(result.folder), expected)
    load_whole("llama", result.folder)
    assert any("3 stored buffers that the model computes are left out" in d for d in result.manifest["decisions"])


def test_buffers_that_every_model_stores_are_copied(llamas: tuple[Path, Path], merged: Merged) -> None:
    for folder in llamas:
        store(folder, state(folder) | FREQUENCIES)
    output = merged(*llamas).folder
    assert_same({name: t for name, t in state(output).items() if name in FREQUENCIES}, FREQUENCIES)


def test_integers_are_copied_where_all_models_agree_and_refused_where_not(tmp_path: Path, merged: Merged) -> None:
    weight, steps = torch.ones(3), torch.arange(6).view(2, 3)
    base = write_checkpoint(tmp_path / "base", {"w": weight, "steps": steps})
    same = write_checkpoint(tmp_path / "same", {"w": weight + 1, "steps": steps})
    other = write_checkpoint(tmp_path / "other", {"w": weight + 1, "steps": steps + 1})
    assert_same(state(merged(base, same).folder), {"w": weight + 0.5, "steps": steps})
    with pytest.raises(MismatchError, match=r"steps \(I64\) .* differs between .*base and .*other"):
        merged(base, same, other, output="refused")
    assert not (tmp_path / "refused").exists()


# ---- dtypes


@pytest.mark.parametrize("output_dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")])
def test_inputs_of_mixed_dtypes_are_rounded_once(
    dtypes: tuple[str, str], output_dtype: str | None, llamas: tuple[Path, Path], tmp_path: Path, merged: Merged
) -> None:
    for folder, dtype in zip(llamas, dtypes, strict=True):
        store(folder, {name: t.to(getattr(torch, dtype)) for name, t in state(folder).items()})
        configure(folder, dtype=dtype)
    base, expert = (state(folder) for folder in llamas)
    wanted = getattr(torch, output_dtype or dtypes[0])
    exact = {name: base[name].double() + 0.5 * (expert[name].double() - base[name].double()) for name in base}
    output = merged(*llamas, **({"dtype": output_dtype} if output_dtype else {})).folder
    assert_same(state(output), {name: tensor.to(wanted) for name, tensor in exact.items()})
    assert load_whole("llama", output).dtype == wanted


def test_out_dtype_wins_over_dtype(llamas: tuple[Path, Path], merged: Merged) -> None:
    output = merged(*llamas, dtype="float32", out_dtype="bfloat16").folder
    assert {tensor.dtype for tensor in state(output).values()} == {torch.bfloat16}
    assert config(output) == {**config(llamas[0]), "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32", "n": 1}, {"torch_dtype": "bfloat16", "n": 1}),
        (
            {"torch_dtype": "float32", "text_config": {"dtype": "float32"}, "vision_config": {"n": 1}},
            {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "vision_config": {"n": 1}},
        ),
    ],
)
def test_the_config_states_the_dtype_under_the_keys_that_it_has(before: dict, after: dict) -> None:
    assert json.loads(patch_config(json.dumps(before).encode(), "bfloat16", untie=False)) == after


@pytest.mark.parametrize("text", ['{"n":  1}', '{"dtype":"bfloat16"}\n', '{"dtype": null}'])
def test_a_config_in_which_nothing_changes_keeps_its_bytes(text: str) -> None:
    assert patch_config(text.encode(), "bfloat16", untie=False) == text.encode()


# ---- shards


def test_a_shard_for_every_tensor_loads_and_holds_the_same(llamas: tuple[Path, Path], merged: Merged) -> None:
    whole = merged(*llamas, output="whole").folder
    parts = merged(*llamas, output="parts", machine={"max_shard_size": "256B"}).folder
    assert len(list(parts.glob("model-*.safetensors"))) == len(state(whole)) > 10
    assert_same(state(parts), state(whole))
    assert_same(load_whole("llama", parts).state_dict(), load_whole("llama", whole).state_dict())


# ---- what does not fit together


def test_tensors_that_only_some_models_have_are_an_error_unless_the_recipe_says_what_to_do(
    tmp_path: Path, merged: Merged
) -> None:
    one = torch.ones(2)
    base = write_checkpoint(tmp_path / "base", {"a": one, "b": one, "c": one})
    expert = write_checkpoint(tmp_path / "expert", {"a": 3 * one, "b": 3 * one, "d": one})
    with pytest.raises(MismatchError) as refused:
        merged(base, expert)
    assert f"{expert} has 1 tensors that {base} lacks: d" in str(refused.value)
    assert f"{expert} lacks 1 tensors that {base} has: c" in str(refused.value)
    filled = merged(base, expert, missing="base", output="filled")
    assert_same(state(filled.folder), {"a": 2 * one, "b": 2 * one, "c": one})
    common = merged(base, expert, missing="skip", output="common")
    assert_same(state(common.folder), {"a": 2 * one, "b": 2 * one})
    for result in (filled, common):
        decisions = "\n".join(result.manifest["decisions"])
        assert "c is missing in" in decisions and "lacks them: d" in decisions


def test_another_architecture_is_refused(tmp_path: Path, merged: Merged) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": torch.ones(2)}, {"model_type": "llama"})
    expert = write_checkpoint(tmp_path / "expert", {"w": torch.ones(2)}, {"model_type": "mistral"})
    with pytest.raises(MismatchError, match=r"base is 'llama', .*expert is 'mistral'"):
        merged(base, expert)


def test_another_shape_is_refused_with_model_tensor_and_both_shapes(tmp_path: Path, merged: Merged) -> None:
    base = write_checkpoint(tmp_path / "base", {"v": torch.ones(2), "w": torch.ones(2, 3)})
    expert = write_checkpoint(tmp_path / "expert", {"v": torch.ones(2), "w": torch.ones(3, 2)})
    with pytest.raises(MismatchError, match=r"w has shape \[2, 3\] in .*base and \[3, 2\] in .*expert"):
        merged(base, expert)


def test_quantised_models_are_refused(tmp_path: Path, merged: Merged) -> None:
    weight = torch.ones(4)
    base = write_checkpoint(tmp_path / "base", {"w": weight})
    stated = write_checkpoint(tmp_path / "stated", {"w": weight}, {"quantization_config": {"quant_method": "fp8"}})
    fp8 = write_checkpoint(tmp_path / "fp8", {"w": weight.to(torch.float8_e4m3fn)})
    with pytest.raises(MismatchError, match="stated is quantised"):
        merged(base, stated)
    with pytest.raises(MismatchError, match=r"w has dtypes that cannot be merged .*fp8: F8_E4M3"):
        merged(base, fp8)
    with pytest.raises(MismatchError, match=r"fp8: w is quantised \(F8_E4M3\)"):
        merged(fp8, write_checkpoint(tmp_path / "fp8 too", state(fp8)))


# ---- pytorch_model.bin


def pickled(folder: Path, content: object, file: str = "pytorch_model.bin", **how: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    torch.save(content, folder / file, **how)
    return folder


PLAIN = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
SHIFTED = {name: tensor + 1 for name, tensor in PLAIN.items()}
HALFWAY = {name: tensor + 0.5 for name, tensor in PLAIN.items()}


@pytest.mark.parametrize("which", ["base", "expert", "both"])
def test_pickled_weights_merge_with_safetensors(which: str, tmp_path: Path, merged: Merged) -> None:
    base, expert = (
        (pickled if which in (name, "both") else write_checkpoint)(tmp_path / name, tensors)
        for name, tensors in (("base", PLAIN), ("expert", SHIFTED))
    )
    output = merged(base, expert).folder
    assert_same(state(output), HALFWAY)
    assert not list(output.glob("*.bin"))


def test_pickled_parameters_and_views_are_read(tmp_path: Path, merged: Merged) -> None:
    """What trainers save: parameters that require gradients, transposed views, two names of one memory."""
    weight = torch.nn.Parameter(torch.arange(6.0).view(3, 2))
    base = pickled(tmp_path / "base", {"a": weight, "b": weight.detach().T, "c": weight})
    plain = {"a": weight.detach(), "b": weight.detach().T, "c": weight.detach()}
    expert = write_checkpoint(tmp_path / "expert", {name: tensor + 1 for name, tensor in plain.items()})
    assert_same(state(merged(base, expert).folder), {name: tensor + 0.5 for name, tensor in plain.items()})


def test_pickled_shards_are_read_by_their_index(tmp_path: Path, merged: Merged) -> None:
    base = write_checkpoint(tmp_path / "base", PLAIN)
    files = {name: f"pytorch_model-0000{i}-of-00002.bin" for i, name in enumerate(SHIFTED, 1)}
    for name, file in files.items():
        expert = pickled(tmp_path / "expert", {name: SHIFTED[name]}, file)
    (expert / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert_same(state(merged(base, expert).folder), HALFWAY)
    (expert / files["b"]).unlink()
    with pytest.raises(CheckpointError, match=f"{files['b']}, which .* names, is missing"):
        merged(base, expert, output="other")


def test_a_pickle_that_would_execute_code_is_refused_and_does_not(tmp_path: Path, merged: Merged) -> None:
    trace = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (trace,)

    base = write_checkpoint(tmp_path / "base", PLAIN)
    expert = pickled(tmp_path / "expert", {**PLAIN, "a": Payload()})
    with pytest.raises(CheckpointError, match=r"expert: pytorch_model\.bin holds more than tensors"):
        merged(base, expert)
    (expert / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match=r"expert: pytorch_model\.bin"):
        merged(base, expert)
    assert not trace.exists()


def broken_pickles() -> Iterator[tuple[str, Callable[[Path], object]]]:
    yield "truncated", lambda file: file.write_bytes(file.read_bytes()[:-200])
    yield "first half", lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    yield "empty", lambda file: file.write_bytes(b"")
    yield "legacy", lambda file: torch.save(SHIFTED, file, _use_new_zipfile_serialization=False)
    yield "no table", lambda file: torch.save([torch.ones(2)], file)
    yield "nested", lambda file: torch.save({"state_dict": SHIFTED}, file)
    yield "complex", lambda file: torch.save({"a": torch.ones(2, dtype=torch.complex64)}, file)
    yield "sparse", lambda file: torch.save({"a": torch.eye(2).to_sparse()}, file)


@pytest.mark.parametrize(("what", "breaks"), broken_pickles())
def test_pickles_that_cannot_be_mapped_are_refused(
    what: str, breaks: Callable[[Path], object], tmp_path: Path, merged: Merged
) -> None:
    base, expert = write_checkpoint(tmp_path / "base", PLAIN), pickled(tmp_path / "expert", SHIFTED)
    breaks(expert / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"expert: pytorch_model\.bin .*safetensors"):
        merged(base, expert)


# ---- the package


def test_a_merge_of_models_with_the_same_names_does_not_import_transformers(
    llamas: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = recipe_text("task_arithmetic", [(llamas[1], {"weight": 0.5})], llamas[0])
    code = """
import sys, ctl_merge
ctl_merge.merge(ctl_merge.parse_recipe(sys.argv[1]), sys.argv[2])
print("transformers" in sys.modules)"""
    command = [sys.executable, "-c", code, recipe, str(tmp_path / "merged")]
    assert subprocess.check_output(command, text=True, cwd=ROOT).strip() == "False"
    assert_same(state(tmp_path / "merged"), by_hand(*map(state, llamas)))
