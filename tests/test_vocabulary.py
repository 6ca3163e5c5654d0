"""Vocabularies that differ: whose tokens the output has, and which rows of which models they get."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import recipe_text, write_checkpoint
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ctl_merge
from ctl_merge.chat_template import TEMPLATES
from ctl_merge.compare import compare
from ctl_merge.errors import MismatchError, RecipeError
from ctl_merge.json_schema import recipe_schema
from ctl_merge.merging import Merge, MergeResult
from ctl_merge.recipe_tokenizer import TokenizerSetting
from ctl_merge.roles import roles

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Merged = Callable[..., MergeResult]


def state(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def configure(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**read_json(folder / "config.json"), **changes}))


# ---- letters: one token a row, numbers by hand

ROWS = torch.arange(10.0).view(5, 2)


def with_vocabulary(folder: Path, embedding: Tensor, tokens: str | None) -> Path:
    """A model of an embedding and a head; one letter of `tokens` is the token of each row."""
    tensors = {EMBEDDING: embedding, "model.norm.weight": torch.ones(2), HEAD: -embedding}
    write_checkpoint(folder, tensors, {"vocab_size": len(embedding)})
    if tokens is not None:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return folder


def test_the_same_tokens_need_no_setting(tmp_path: Path, merged: Merged) -> None:
    base = with_vocabulary(tmp_path / "base", ROWS, "abcde")
    expert = with_vocabulary(tmp_path / "expert", ROWS + 2, "abcde")
    assert torch.equal(state(merged(base, expert).folder)[EMBEDDING], ROWS + 1)


@pytest.mark.parametrize(
    ("rows", "tokens", "expected"),
    [
        (6, "abcdef", ROWS + 1),  # the row of f is left out
        (4, "abcd", torch.cat([ROWS[:4] + 1, ROWS[4:]])),  # the row of e is the base's
        (5, "abxde", torch.cat([ROWS[:2] + 1, ROWS[2:3], ROWS[3:] + 1])),  # the row of x is the base's of c
        (7, "axcdefg", torch.cat([ROWS[:1] + 1, ROWS[1:2], ROWS[2:] + 1])),
        (3, "axc", torch.cat([ROWS[:1] + 1, ROWS[1:2], ROWS[2:3] + 1, ROWS[3:]])),
    ],
)
def test_other_vocabularies_are_refused_unless_the_recipe_keeps_the_bases(
    rows: int, tokens: str, expected: Tensor, tmp_path: Path, merged: Merged
) -> None:
    base = with_vocabulary(tmp_path / "base", ROWS, "abcde")
    theirs = torch.full((rows, 2), 100.0)
    theirs[: min(rows, 5)] = ROWS[:rows] + 2
    expert = with_vocabulary(tmp_path / "expert", theirs, tokens)
    with pytest.raises(MismatchError, match="tokenizer_source: base"):
        merged(base, expert)
    result = merged(base, expert, tokenizer_source="base")
    found = state(result.folder)
    assert torch.equal(found[EMBEDDING], expected)
    assert torch.equal(found[HEAD], -expected)
    assert read_json(result.folder / "config.json")["vocab_size"] == 5
    assert any("vocabulary of" in decision for decision in result.manifest["decisions"])


def test_rows_are_counted_for_each_tensor(tmp_path: Path, merged: Merged) -> None:
    """An embedding may be padded where the head is not."""
    base = with_vocabulary(tmp_path / "base", ROWS, "abcde")
    expert = with_vocabulary(tmp_path / "expert", ROWS + 2, "abcde")
    padding = torch.full((3, 2), 7.0)
    save_file({**state(base), EMBEDDING: torch.cat([ROWS, padding])}, base / "model.safetensors")
    found = state(merged(base, expert, tokenizer_source="base").folder)
    assert torch.equal(found[EMBEDDING], torch.cat([ROWS + 1, padding]))
    assert torch.equal(found[HEAD], -ROWS - 1)


def test_a_vocabulary_refused_by_its_size_names_both_sizes(tmp_path: Path, merged: Merged) -> None:
    base = with_vocabulary(tmp_path / "base", ROWS, "abcde")
    expert = with_vocabulary(tmp_path / "expert", ROWS[:4], "abcd")
    with pytest.raises(MismatchError, match=r"5 rows in .*base, 4 in .*expert"):
        merged(base, expert)


@pytest.mark.parametrize("tokens", ["abdce", "eabcd"])
def test_tokens_at_other_rows_are_moved_where_the_recipe_asks_for_it(
    tokens: str, tmp_path: Path, merged: Merged
) -> None:
    base = with_vocabulary(tmp_path / "base", ROWS, "abcde")
    there = ROWS[[("abcde").index(token) for token in tokens]] + 2
    expert = with_vocabulary(tmp_path / "expert", there, tokens)
    with pytest.raises(MismatchError, match="ids stand for other tokens"):
        merged(base, expert)
    assert torch.equal(state(merged(base, expert, tokenizer_source="base").folder)[EMBEDDING], ROWS + 1)


def test_rows_of_unknown_tokens_are_refused(tmp_path: Path, merged: Merged) -> None:
    base = with_vocabulary(tmp_path / "base", ROWS, None)
    expert = with_vocabulary(tmp_path / "expert", torch.ones(6, 2), "abcdef")
    with pytest.raises(MismatchError, match="its tokenizer is unknown"):
        merged(base, expert, tokenizer_source="base")


# ---- real tokenizers: byte-level BPE, trained here

PROSE = "the quick brown fox jumps over the lazy dog and then the dog sleeps under the old tree near the river " * 3
CODE = "def main(argument): return [index for index in range(argument) if index % 2 == 0]  # the list of indices " * 3
WIDTH = 8


def train(text: str, special: Sequence[str], size: int = 300) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


PLAIN = train(PROSE, ["<s>", "</s>"])
CODER = train(CODE, ["<|start|>", "</s>", "<|call|>"], 310)  # shifts all bytes by one, and knows <s> not at all


def write_llama(
    folder: Path, tokenizer: Tokenizer, seed: int, *, rows: int | None = None, tie: bool = False,
    special: Mapping[str, str] = {"eos_token": "</s>"}, files: Mapping[str, Any] = {}, **config: Any,
) -> Path:  # fmt: skip
    """A tiny Llama whose row i of the embedding is 1000 * seed + i in its first place, with its tokenizer."""
    size = rows or tokenizer.get_vocab_size()
    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=size, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tie, max_position_embeddings=256, **config,
    )  # fmt: skip
    model = LlamaForCausalLM(settings)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1000 * seed + torch.arange(size)
        if not tie:
            model.lm_head.weight[:, 0] = -1000 * seed - torch.arange(size)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special, **files})
    )
    return folder


def vocabulary(folder: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def row_of(
    tables: list[np.ndarray], ids: Sequence[int | None], token: str, base: int | None, settings: Mapping[str, Any]
) -> np.ndarray:
    """Each model's row for one token by the rule, read off: (models, width) float64."""
    own = [table[i] if i is not None and i < len(table) else None for table, i in zip(tables, ids, strict=True)]
    there = [row for row in own if row is not None]
    if token in settings and "source" in settings[token]:
        stand_in = settings[token]["source"](tables)
    elif base is not None and own[base] is not None:
        stand_in = own[base]
    else:
        stand_in = sum(there) / len(there) if there else np.zeros(tables[0].shape[1])
    force = settings.get(token, {}).get("force", False)
    return np.array([stand_in if row is None or force else row for row in own])


def by_rule(output: Path, models: Sequence[Path], name: str, settings: Mapping[str, Any] = {}) -> np.ndarray:
    """The merge base + Σ 0.5 (x - base) of every token's row, (tokens, width): no code of the package."""
    merged = {}
    states, known = [state(folder) for folder in models], [vocabulary(folder) for folder in models]
    tables = [tensors.get(name, tensors[EMBEDDING]).double().numpy() for tensors in states]
    for token, i in vocabulary(output).items():
        rows = row_of(tables, [ids.get(token) for ids in known], token, 0, settings)
        merged[i] = rows[0] + 0.5 * (rows[1:] - rows[0]).sum(0)
    return np.array([merged[i] for i in sorted(merged)])


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_llama(tmp_path / "base", PLAIN, 1), write_llama(tmp_path / "coder", CODER, 2)


def assert_rows(output: Path, models: Sequence[Path], settings: Mapping[str, Any] = {}) -> None:
    """All tables of the output are what the rule says, to the last bit of float32."""
    stored = state(output)
    for name in {EMBEDDING, HEAD} & stored.keys():
        expected = torch.from_numpy(by_rule(output, models, name, settings)).float()
        assert torch.equal(stored[name][: len(expected)], expected), name


def assert_runs(output: Path, *texts: str) -> None:
    """transformers reads the tokenizer and the model; every token has a row."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    model, told = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert ids.max() < model.config.vocab_size and tokenizer.decode(ids[0]) == text
        assert torch.isfinite(model(input_ids=ids).logits).all()


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_union_has_all_tokens_with_their_rows(tie: bool, tmp_path: Path, merged: Merged) -> None:
    base = write_llama(tmp_path / "base", PLAIN, 1, tie=tie)
    coder = write_llama(tmp_path / "coder", CODER, 2, tie=tie)
    output = merged(base, coder, tokenizer_source="union").folder
    ours, theirs, both = vocabulary(base), vocabulary(coder), vocabulary(output)
    assert both.keys() == ours.keys() | theirs.keys() and {t: both[t] for t in ours} == ours
    new = sorted(theirs.keys() - ours.keys(), key=theirs.__getitem__)
    assert [both[token] for token in new] == list(range(len(ours), len(both)))  # in the order of their ids
    assert_rows(output, [base, coder])
    assert read_json(output / "config.json")["vocab_size"] == len(both) == state(output)[EMBEDDING].shape[0]
    assert (HEAD in state(output)) == (not tie)
    assert_runs(output, PROSE[:80], CODE[:80], "<|call|>def <s>the")


def test_the_tokens_of_a_union_are_used(pair: tuple[Path, Path], merged: Merged) -> None:
    """Text of either model becomes tokens of its own, not letters."""
    base, coder = pair
    output = Tokenizer.from_file(str(merged(*pair, tokenizer_source="union").folder / "tokenizer.json"))
    ours, theirs = vocabulary(base), vocabulary(coder)
    assert len(output.encode(PROSE)) <= len(PLAIN.encode(PROSE))
    assert len(set(output.encode(CODE).tokens) & theirs.keys() - ours.keys()) > 15
    assert len(CODER.encode(CODE)) <= len(output.encode(CODE)) < 0.6 * len(PLAIN.encode(CODE))
    assert output.token_to_id("<|call|>") == output.encode("a<|call|>b").ids[1]


def test_the_tokenizer_of_a_model_brings_its_ids_and_special_tokens(tmp_path: Path, merged: Merged) -> None:
    base = write_llama(tmp_path / "base", PLAIN, 1, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    coder = write_llama(tmp_path / "coder", CODER, 2, bos_token_id=0, eos_token_id=[1, 2], files={"x": 1})
    generation = {"eos_token_id": 1, "pad_token_id": 1, "temperature": 0.5}
    (base / "generation_config.json").write_text(json.dumps(generation))
    (coder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.9}))
    (base / "special_tokens_map.json").write_text("{}")
    output = merged(base, coder, tokenizer_source=str(coder)).folder
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / file).read_bytes() == (coder / file).read_bytes()
    assert not (output / "special_tokens_map.json").exists()
    config = read_json(output / "config.json")
    assert (config["vocab_size"], config["eos_token_id"], config["bos_token_id"]) == (310, [1, 2], 0)
    assert config.get("pad_token_id") == read_json(coder / "config.json").get("pad_token_id")
    assert read_json(output / "generation_config.json") == {"eos_token_id": [1, 2], "temperature": 0.5}
    assert_rows(output, [base, coder])
    assert_runs(output, CODE[:80])


def test_a_tokenizer_may_come_from_a_model_that_is_not_merged(
    pair: tuple[Path, Path], tmp_path: Path, merged: Merged
) -> None:
    other = train(PROSE + CODE, ["<pad>", "</s>"], 340)
    donor = write_llama(tmp_path / "donor", other, 3)
    (donor / "model.safetensors").unlink()
    output = merged(*pair, tokenizer_source=str(donor)).folder
    assert (output / "tokenizer.json").read_bytes() == (donor / "tokenizer.json").read_bytes()
    assert state(output)[EMBEDDING].shape[0] == 340
    assert_rows(output, pair)
    result = read_json(output / "merge_manifest.json")
    unmade = set(vocabulary(donor)) - set(vocabulary(pair[0])) - set(vocabulary(pair[1]))
    assert "<pad>" in unmade
    assert any(f"{len(unmade)} tokens have a row in no model" in warning for warning in result["warnings"])


def test_the_bases_vocabulary_moves_the_rows_of_others(pair: tuple[Path, Path], merged: Merged) -> None:
    base, coder = pair
    result = merged(*pair, tokenizer_source="base")
    assert (result.folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (result.folder / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert_rows(result.folder, pair)
    ours, theirs = vocabulary(base), vocabulary(coder)
    moved = sum(theirs.get(token, i) != i for token, i in ours.items())
    told = next(line for line in result.manifest["decisions"] if "moved" in line)
    assert f"{moved} rows moved" in told and f"{len(ours.keys() - theirs)} rows taken from" in told
    assert f"{len(theirs.keys() - ours)} of its own left out" in told


TOKENS: dict[str, tuple[dict[str, Any], Callable[[list[np.ndarray]], np.ndarray]]] = {
    "a model": ({"source": "COD"}, lambda tables: tables[1][CODER.token_to_id("a")]),
    "a token": (
        {"source": {"kind": "model_token", "model": "COD", "token": "<|call|>"}},
        lambda tables: tables[1][CODER.token_to_id("<|call|>")],
    ),
    "an id": ({"source": {"kind": "model_token", "model": "BASE", "token_id": 5}}, lambda tables: tables[0][5]),
    "zero": ({"source": {"kind": "zero"}}, lambda tables: np.zeros(WIDTH)),
}


def with_folders(data: Any, pair: tuple[Path, Path]) -> Any:
    return yaml.safe_load(yaml.safe_dump(data).replace("BASE", str(pair[0])).replace("COD", str(pair[1])))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", TOKENS)
@pytest.mark.parametrize("token", ["a", "<s>", "<|start|>"])  # of both, of the base, of the other
def test_a_token_gets_its_row_from_where_the_recipe_says(
    token: str, what: str, force: bool, pair: tuple[Path, Path], merged: Merged
) -> None:
    given, source = TOKENS[what]
    if what == "a model":
        if token == "<s>":
            return  # which the other model lacks: refused, see below
        source = lambda tables: tables[1][CODER.token_to_id(token)]  # noqa: E731
    setting = {**with_folders(given, pair), "force": force}
    tokenizer = {"source": "union", "tokens": {token: setting}}
    output = merged(*pair, tokenizer=tokenizer).folder
    assert_rows(output, pair, {token: {"source": source, "force": force}})


def test_force_without_a_source_gives_all_models_the_default(pair: tuple[Path, Path], merged: Merged) -> None:
    output = merged(*pair, tokenizer={"source": "base", "tokens": {"a": {"force": True}}}).folder
    i = vocabulary(pair[0])["a"]
    assert torch.equal(state(output)[EMBEDDING][i], state(pair[0])[EMBEDDING][i])


@pytest.mark.parametrize("source", ["base", "union"])
def test_a_token_that_the_vocabulary_lacks_is_added(source: str, pair: tuple[Path, Path], merged: Merged) -> None:
    """With the flags that it has elsewhere; one that no model has is found as it is written."""
    tokens = {
        "<|call|>": {"source": str(pair[1])},
        "<|new|>": {"source": {"kind": "model_token", "model": str(pair[0]), "token": "</s>"}},
    }
    output = merged(*pair, tokenizer={"source": source, "tokens": tokens}).folder
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    assert tokenizer.encode("a<|call|>b<|new|>c").tokens == ["a", "<|call|>", "b", "<|new|>", "c"]
    flags = {entry["content"]: entry["special"] for entry in read_json(output / "tokenizer.json")["added_tokens"]}
    assert flags["<|call|>"] is True and flags["<|new|>"] is False
    new = {"source": lambda tables: tables[0][1]}
    assert_rows(output, pair, {"<|new|>": new})
    assert_runs(output, PROSE[:50])


@pytest.mark.parametrize(("multiple", "rows"), [(64, 320), (1, 300), (300, 300), (1000, 1000)])
def test_rows_are_padded_to_a_multiple(multiple: int, rows: int, tmp_path: Path, merged: Merged) -> None:
    """The padding is the mean of the rows of tokens; a table that was padded may shrink, as it was asked for."""
    base = write_llama(tmp_path / "base", PLAIN, 1, rows=310)
    expert = write_llama(tmp_path / "expert", PLAIN, 3, rows=310)
    output = merged(base, expert, tokenizer={"source": "base", "pad_to_multiple_of": multiple}).folder
    stored = state(output)
    assert (
        stored[EMBEDDING].shape[0] == stored[HEAD].shape[0] == rows == read_json(output / "config.json")["vocab_size"]
    )
    ours, theirs = (state(folder)[EMBEDDING].double() for folder in (base, expert))
    assert torch.equal(stored[EMBEDDING][:300], ((ours + theirs) / 2).float()[:300])
    if rows > 310:
        mean = ((ours + theirs) / 2)[:310].mean(0).expand(rows - 310, -1).float()
        torch.testing.assert_close(stored[EMBEDDING][310:], mean, rtol=1e-6, atol=0)
    assert_runs(output, PROSE[:50])


def test_a_padded_embedding_does_not_shrink_and_its_padding_is_used_first(tmp_path: Path, merged: Merged) -> None:
    base = write_llama(tmp_path / "base", PLAIN, 1, rows=400)
    coder = write_llama(tmp_path / "coder", CODER, 2)
    output = merged(base, coder, tokenizer_source="union").folder
    new = len(vocabulary(coder).keys() - vocabulary(base).keys())
    assert len(vocabulary(output)) == 300 + new < 400
    assert state(output)[EMBEDDING].shape[0] == 400
    assert (output / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert_rows(output, [base, coder])
    assert torch.equal(state(output)[EMBEDDING][300 + new :], state(base)[EMBEDDING][300 + new :])


def test_a_token_of_several_models_that_the_base_lacks_is_their_mean(tmp_path: Path, merged: Merged) -> None:
    base = write_llama(tmp_path / "base", PLAIN, 1)
    others = [write_llama(tmp_path / f"coder{i}", CODER, 2 + i) for i in range(2)]
    output = merged(base, *others, tokenizer_source="union").folder
    i, j = vocabulary(output)["Ġindex"], vocabulary(others[0])["Ġindex"]
    mean = sum(state(o)[EMBEDDING][j].double() for o in others) / 2
    own = sum(0.5 * (state(o)[EMBEDDING][j].double() - mean) for o in others)
    assert torch.equal(state(output)[EMBEDDING][i], (mean + own).float())
    assert_rows(output, [base, *others])


def test_without_a_base_model_the_mean_counts_the_first_model_like_the_others(tmp_path: Path) -> None:
    """mergekit prefers the row of `base_model`, which the first model is not."""
    folders = [write_llama(tmp_path / f"{i}", t, 1 + i) for i, t in enumerate([PLAIN, PLAIN, CODER])]
    recipe = recipe_text("linear", [(f, {"weight": w}) for f, w in zip(folders, [1, 2, 4], strict=True)],
                         tokenizer_source="union")  # fmt: skip
    found = ctl_merge.open_merge(ctl_merge.parse_recipe(recipe)).read(EMBEDDING)
    one, two = (state(f)[EMBEDDING].double() for f in folders[:2])
    i = vocabulary(folders[0])["<s>"]
    assert torch.equal(found[i], ((one[i] + 2 * two[i] + 4 * (one[i] + two[i]) / 2) / 7).float())


# ---- partial reads, dtypes, views


def test_any_part_of_a_table_is_a_slice_of_the_whole(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", PLAIN, 1)
    others = [write_llama(tmp_path / f"coder{i}", CODER, 2 + i) for i in range(2)]
    tokens = {"a": {"source": {"kind": "zero"}, "force": True}}
    recipe = recipe_text("ties", [(o, {"weight": 0.7, "density": 0.6}) for o in others], base,
                         tokenizer={"source": "union", "tokens": tokens, "pad_to_multiple_of": 128})  # fmt: skip
    opened = ctl_merge.open_merge(ctl_merge.parse_recipe(recipe))
    for checkpoint in (opened, *(opened.parent(ref) for ref in opened.plan.recipe.refs)):
        whole = checkpoint.read(EMBEDDING).view(-1)
        for start, count in [(0, 1), (5, 37), (8 * 300 - 3, 50), (len(whole) - 700, 700), (8 * 66 + 1, 6), (17, 3000)]:
            part = torch.empty(count)
            checkpoint.read_into(EMBEDDING, part, start)
            assert torch.equal(part, whole[start : start + count]), (start, count)


def test_parents_are_seen_with_the_outputs_rows(pair: tuple[Path, Path]) -> None:
    recipe = ctl_merge.parse_recipe(recipe_text("linear", [(p, {"weight": 1}) for p in pair], tokenizer_source="union"))
    opened = Merge(recipe)
    opened.fetch()
    views = [opened.merged.parent(ref).read(EMBEDDING).double() for ref in recipe.refs]
    assert views[0].shape == views[1].shape == opened.merged.tensors[EMBEDDING].shape
    torch.testing.assert_close((views[0] + views[1]) / 2, opened.merged.read(EMBEDDING).double(), rtol=1e-7, atol=0)
    assert opened.merged.parent(recipe.refs[1]).config["vocab_size"] == views[0].shape[0]
    found = compare(opened, base=recipe.refs[0])
    assert found.data["tensors"]


def test_a_base_that_is_only_looked_at_has_no_say_in_the_vocabulary(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", train(PROSE + CODE, ["<pad>", "</s>"], 340), 3)
    recipe = ctl_merge.parse_recipe(recipe_text("linear", [(p, {"weight": 1}) for p in pair], tokenizer_source="union"))
    opened = Merge(recipe)
    opened.fetch()
    seen = ctl_merge.parse_recipe(recipe_text("linear", [(other, {"weight": 1})])).models[0].ref
    base, parents = roles(opened, seen)
    shapes = {c.tensors[EMBEDDING].shape for c in (base, opened.merged, *parents.values())}
    assert shapes == {opened.merged.tensors[EMBEDDING].shape}
    found = [parent.read(EMBEDDING) for parent in parents.values()]
    expected = [opened.merged.parent(ref).read(EMBEDDING) for ref in recipe.refs]
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert compare(opened, base=seen).data["tensors"]


def test_a_merge_with_another_vocabulary_is_probed_and_is_a_model(pair: tuple[Path, Path]) -> None:
    """The texts are cut by the output's tokenizer; parents and merge have all of its rows."""
    recipe = ctl_merge.parse_recipe(
        recipe_text("task_arithmetic", [(pair[1], {"weight": 0.5})], pair[0], tokenizer_source="union")
    )
    report = ctl_merge.probe(recipe, sequences=2, length=16)
    assert [row["block"] for row in report.rows if row["part"] == "block"]
    model = ctl_merge.load_model(recipe)
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) > CODER.get_vocab_size()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_are_rounded_once(dtype: str, pair: tuple[Path, Path], merged: Merged) -> None:
    output = merged(*pair, tokenizer_source="union", dtype=dtype).folder
    wanted = torch.from_numpy(by_rule(output, pair, EMBEDDING)).to(getattr(torch, dtype))
    assert torch.equal(state(output)[EMBEDDING], wanted)


def test_biases_of_the_head_follow_in_both_of_their_shapes(tmp_path: Path, merged: Merged) -> None:
    """BERT's is a vector, BART's a table of one row."""
    names, shapes = ("cls.predictions.bias", "final_logits_bias"), ((-1,), (1, -1))
    folders = []
    for at, letters in enumerate(["abcd", "cxa"]):
        rows = 10.0 * at + torch.arange(len(letters))
        tensors = {n: rows.view(s) for n, s in zip(names, shapes, strict=True)}
        places = {"embeddings.position_embeddings.weight": torch.full((9, 2), float(at))}  # as long, and of no tokens
        folder = tmp_path / letters
        tensors = {**tensors, **places, EMBEDDING: rows.view(-1, 1).repeat(1, 2)}
        write_checkpoint(folder, tensors, {"vocab_size": len(letters), "text_config": {"vocab_size": len(letters)}})
        letter_tokenizer(letters).save(str(folder / "tokenizer.json"))
        folders.append(folder)
    output = merged(*folders, tokenizer_source="union").folder
    expected = torch.tensor([(0 + 12) / 2, 1, (2 + 10) / 2, 3, 11.0])
    for name, shape in zip(names, shapes, strict=True):
        assert torch.equal(state(output)[name], expected.view(shape))
    assert torch.equal(state(output)[EMBEDDING], expected.view(-1, 1).repeat(1, 2))
    assert state(output)["embeddings.position_embeddings.weight"].shape == (9, 2)
    config = read_json(output / "config.json")
    assert config["vocab_size"] == config["text_config"]["vocab_size"] == 5


# ---- tokenizers of other kinds, and files of other times


def letter_tokenizer(letters: str) -> Tokenizer:
    return Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=letters[0]))


def write_letters(folder: Path, tokenizer: Tokenizer, seed: int) -> Path:
    size = tokenizer.get_vocab_size()
    rows = 100.0 * seed + torch.arange(2.0 * size).view(-1, 2)
    write_checkpoint(folder, {EMBEDDING: rows, "model.norm.weight": torch.ones(2)}, {"vocab_size": size})
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_union_of_wordpiece_vocabularies_is_used(tmp_path: Path, merged: Merged) -> None:
    folders = []
    for seed, words in enumerate([["[UNK]", "play", "##ing"], ["[UNK]", "player", "##s", "play"]]):
        tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.add_special_tokens([f"[S{seed}]"])
        folders.append(write_letters(tmp_path / f"{seed}", tokenizer, seed))
        (folders[-1] / "vocab.txt").write_text("".join(f"{word}\n" for word in [*words, f"[S{seed}]"]))
    output = merged(*folders, tokenizer_source="union").folder
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    assert tokenizer.encode("players playing [S1]").tokens == ["player", "##s", "play", "##ing", "[S1]"]
    in_order = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    assert in_order == (output / "vocab.txt").read_text().split()
    assert in_order == ["[UNK]", "play", "##ing", "[S0]", "player", "##s", "[S1]"]


def unigram(letters: str, *added: str) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([(letter, -1.0 - i) for i, letter in enumerate(letters)], unk_id=0))
    tokenizer.add_special_tokens(list(added))
    return tokenizer


def test_unigrams_are_united_by_added_tokens_only(tmp_path: Path, merged: Merged) -> None:
    base = write_letters(tmp_path / "base", unigram("?abc", "<x>"), 0)
    other = write_letters(tmp_path / "other", unigram("?abc", "<y>", "<x>"), 1)
    output = merged(base, other, tokenizer_source="union").folder
    assert vocabulary(output) == {"?": 0, "a": 1, "b": 2, "c": 3, "<x>": 4, "<y>": 5}
    ours, theirs = state(base)[EMBEDDING], state(other)[EMBEDDING]
    expected = torch.cat([(ours[:4] + theirs[:4]) / 2, (ours[4:] + theirs[5:6]) / 2, theirs[4:5]])
    assert torch.equal(state(output)[EMBEDDING], expected)
    more = write_letters(tmp_path / "more", unigram("?abcd"), 2)
    with pytest.raises(MismatchError, match="Unigram tokenizers, whose tokens have no room for others"):
        merged(base, more, tokenizer_source="union", output="refused")
    assert merged(base, more, tokenizer_source="base", output="kept").folder.exists()


def test_cores_that_spell_words_in_other_ways_are_not_united(tmp_path: Path, merged: Merged) -> None:
    base = write_letters(tmp_path / "base", PLAIN, 0)
    pieces = Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2}, [("▁", "a")], byte_fallback=True))
    pieces.normalizer = normalizers.Replace(" ", "▁")
    other = write_letters(tmp_path / "other", pieces, 1)
    with pytest.raises(MismatchError, match="base writes tokens as bytes, .*other as characters, bytes of unknown"):
        merged(base, other, tokenizer_source="union")
    with pytest.raises(MismatchError, match="a union of a BPE .* and a WordLevel .* is neither"):
        merged(base, write_letters(tmp_path / "words", letter_tokenizer("✓abc"), 1), tokenizer_source="union")


def test_another_way_to_split_text_is_told(tmp_path: Path, merged: Merged) -> None:
    other = train(CODE, ["</s>"])
    other.normalizer = normalizers.NFC()
    folders = write_letters(tmp_path / "base", PLAIN, 0), write_letters(tmp_path / "other", other, 1)
    warnings = merged(*folders, tokenizer_source="union").manifest["warnings"]
    assert any("split text differently (normalizer)" in warning for warning in warnings)


def sentencepiece(folder: Path, rows: int, pieces: bytes, added: dict[str, int] | None = None) -> Path:
    embedding = torch.arange(2.0 * rows).view(rows, 2) + len(added or {})
    write_checkpoint(folder, {EMBEDDING: embedding, "model.norm.weight": torch.ones(2)}, {"vocab_size": rows})
    (folder / "tokenizer.model").write_bytes(pieces)
    (folder / "added_tokens.json").write_text(json.dumps(added or {}))
    return folder


def test_sentencepiece_alone_keeps_the_bases_vocabulary_and_takes_no_union(tmp_path: Path, merged: Merged) -> None:
    base = sentencepiece(tmp_path / "base", 5, b"pieces", {"<b>": 4})
    other = sentencepiece(tmp_path / "other", 7, b"pieces", {"<pad>": 4, "<x>": 5, "<b>": 6})
    found = state(merged(base, other, tokenizer_source="base").folder)[EMBEDDING]
    ours, theirs = state(base)[EMBEDDING], state(other)[EMBEDDING]
    assert torch.equal(found, (ours + theirs[[0, 1, 2, 3, 6]]) / 2)  # <b> is moved
    with pytest.raises(MismatchError, match=r"base has no tokenizer\.json, .* save a fast tokenizer first"):
        merged(base, other, tokenizer_source="union", output="refused")
    stranger = sentencepiece(tmp_path / "stranger", 7, b"other pieces")
    with pytest.raises(MismatchError, match="its tokenizer is unknown"):
        merged(base, stranger, tokenizer_source="base", output="refused")


def test_pieces_are_known_from_a_model_that_has_them_in_another_form_too(tmp_path: Path, merged: Merged) -> None:
    base = write_letters(tmp_path / "base", letter_tokenizer("?abc"), 0)
    (base / "tokenizer.model").write_bytes(b"pieces")
    other = sentencepiece(tmp_path / "other", 6, b"pieces", {"<x>": 4, "<y>": 5})
    output = merged(base, other, tokenizer_source="base").folder
    ours, theirs = state(base)[EMBEDDING], state(other)[EMBEDDING]
    rows = torch.cat([(ours + theirs[:4]) / 2, theirs[4:]])
    assert torch.equal(state(output)[EMBEDDING], rows[:4])
    both = merged(base, other, tokenizer_source="union", output="both").folder
    assert torch.equal(state(both)[EMBEDDING], rows)
    assert (both / "tokenizer.model").exists()  # still true of the core


def test_files_for_older_readers_follow(pair: tuple[Path, Path], merged: Merged) -> None:
    base, _ = pair
    model = read_json(base / "tokenizer.json")["model"]
    (base / "vocab.json").write_text(json.dumps(model["vocab"]))
    (base / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    (base / "added_tokens.json").write_text(json.dumps({"</s>": 1}))
    (base / "tokenizer.model").write_bytes(b"a core without the new tokens")
    config = read_json(base / "tokenizer_config.json")
    (base / "tokenizer_config.json").write_text(
        json.dumps({**config, "added_tokens_decoder": {"1": {"content": "</s>"}}})
    )
    output = merged(*pair, tokenizer_source="union").folder
    both = vocabulary(output)
    assert read_json(output / "vocab.json") == read_json(output / "tokenizer.json")["model"]["vocab"] == both
    old = Tokenizer(models.BPE.from_file(str(output / "vocab.json"), str(output / "merges.txt")))
    old.pre_tokenizer = PLAIN.pre_tokenizer
    assert old.encode(CODE).ids == Tokenizer.from_file(str(output / "tokenizer.json")).encode(CODE).ids
    added = {token: both[token] for token in ("<|start|>", "<|call|>")}
    assert read_json(output / "added_tokens.json") == {"</s>": 1, **added}
    decoder = read_json(output / "tokenizer_config.json")["added_tokens_decoder"]
    assert {entry["content"]: int(i) for i, entry in decoder.items()} == {"</s>": 1, **added}
    assert decoder[str(added["<|call|>"])]["special"] is True
    assert not (output / "tokenizer.model").exists()


def test_merges_written_as_text_stay_text(pair: tuple[Path, Path], merged: Merged) -> None:
    for folder in pair:
        whole = read_json(folder / "tokenizer.json")
        whole["model"]["merges"] = [" ".join(merge) for merge in whole["model"]["merges"]]
        (folder / "tokenizer.json").write_text(json.dumps(whole))
    output = merged(*pair, tokenizer_source="union").folder
    assert all(isinstance(merge, str) for merge in read_json(output / "tokenizer.json")["model"]["merges"])
    assert_rows(output, pair)


def test_tokens_of_the_base_without_a_row_get_one_where_a_union_passes_them(tmp_path: Path, merged: Merged) -> None:
    tokenizer = Tokenizer.from_str(PLAIN.to_str())
    tokenizer.add_tokens([AddedToken("<pad>", special=True)])
    base = write_llama(tmp_path / "base", tokenizer, 1, rows=300)
    coder = write_llama(tmp_path / "coder", CODER, 2)
    result = merged(base, coder, tokenizer_source="union")
    both = vocabulary(result.folder)
    assert both["<pad>"] == 300 and min(both[t] for t in both.keys() - tokenizer.get_vocab().keys()) == 301
    assert torch.equal(state(result.folder)[EMBEDDING][300], torch.zeros(WIDTH))
    assert any("1 tokens have a row in no model" in warning for warning in result.manifest["warnings"])
    assert_rows(result.folder, [base, coder])


def test_a_vocabulary_of_128_thousand_tokens_is_planned_in_seconds(tmp_path: Path) -> None:
    """Most of the time goes into reading tokenizer.json; the other one has its tokens one row further on."""
    size = 128_000
    for at, shift in enumerate([0, 0, 1]):
        table = {f"t{i}": (i + shift) % size for i in range(size)}
        tokenizer = Tokenizer(models.BPE(table, []))
        folder = write_checkpoint(
            tmp_path / f"{at}", {EMBEDDING: torch.ones(size, 2), HEAD: torch.ones(size, 2)}, {"vocab_size": size}
        )
        tokenizer.save(str(folder / "tokenizer.json"))
    folders = [tmp_path / f"{at}" for at in range(3)]
    models_ = [(folder, {"weight": 0.5}) for folder in folders[1:]]
    recipe = ctl_merge.parse_recipe(recipe_text("task_arithmetic", models_, folders[0], tokenizer_source="union"))
    start = time.perf_counter()
    plan = Merge(recipe).plan
    assert time.perf_counter() - start < 3
    rows = plan.vocabulary.rows[EMBEDDING]
    assert [found is None for found in rows.values()] == [True, True, False]


# ---- chat templates

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "So?"}]
RENDERED = {
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nHi\n\n### Response:\nYo</s>\n\n### Instruction:\nSo?\n\n### Response:\n",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "exaone": "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Yo[|endofturn|]\n[|user|]So?\n[|assistant|]",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
    "\n\nYo<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nSo?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Hi [/INST] Yo</s>[INST] So? [/INST]",
}
BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
LITERAL = "{% for m in messages %}{{ m['content'] }};{% endfor %}"


def rendered(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("template", [*RENDERED, LITERAL])
def test_a_chat_template_is_known_by_name_or_written_out(template: str, tmp_path: Path, merged: Merged) -> None:
    folders = [write_llama(tmp_path / f"{i}", PLAIN, i, special=BOTH) for i in range(2)]
    output = merged(*folders, chat_template=template).folder
    assert rendered(output) == RENDERED.get(template, "Hi;Yo;So?;")
    assert (output / "tokenizer.json").read_bytes() == (folders[0] / "tokenizer.json").read_bytes()


def test_every_template_has_its_rendering() -> None:
    assert TEMPLATES.keys() == RENDERED.keys()


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json"])
def test_a_chat_template_goes_where_the_tokenizer_keeps_its_own(place: str, tmp_path: Path, merged: Merged) -> None:
    folders = [write_llama(tmp_path / f"{i}", PLAIN, i, special=BOTH) for i in range(2)]
    base = folders[0]
    if place == "chat_template.jinja":
        (base / place).write_text("{{ 'outdated' }}")
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'outdated' }}")
    else:
        before = read_json(base / place) if place == "tokenizer_config.json" else {}
        (base / place).write_text(json.dumps({**before, "chat_template": "{{ 'outdated' }}"}))
    output = merged(*folders, chat_template="chatml").folder
    assert rendered(output) == RENDERED["chatml"]
    assert not [path for path in output.rglob("*.j*") if "outdated" in path.read_text()]
    assert (output / "chat_template.jinja").exists() == (place == "chat_template.jinja")
    assert not (output / "additional_chat_templates").exists()


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        (["{{ 'a' }}", "{{ 'b' }}", "{{ 'b' }}\n"], "b"),  # most
        (["{{ 'a' }}", "{{ 'b' }}", None], "a"),  # equally many: the base's
        ([None, None, "{{ 'b' }}"], "b"),
    ],
)
def test_auto_is_the_template_of_most_models(
    templates: list[str | None], expected: str, tmp_path: Path, merged: Merged
) -> None:
    folders = []
    for i, template in enumerate(templates):
        folders.append(write_llama(tmp_path / f"{i}", PLAIN, i, files={"chat_template": template} if template else {}))
    output = merged(*folders, chat_template="auto").folder
    assert rendered(output) == expected


def test_auto_writes_nothing_where_no_model_has_a_template(pair: tuple[Path, Path], merged: Merged) -> None:
    result = merged(*pair, tokenizer_source="base", chat_template="auto")
    assert "no model has a chat template: none is written" in result.manifest["decisions"]
    config = "tokenizer_config.json"
    assert (result.folder / config).read_bytes() == (pair[0] / config).read_bytes()


def test_a_chat_template_needs_a_tokenizer(tmp_path: Path, merged: Merged) -> None:
    folders = [write_checkpoint(tmp_path / f"{i}", {"w": torch.ones(2)}) for i in range(2)]
    with pytest.raises(MismatchError, match="has no tokenizer files that could hold one"):
        merged(*folders, chat_template="chatml")


# ---- what a recipe may not say

LINEAR = "merge_method: linear\nparameters: {weight: 1}\nmodels:\n- model: org/a\n- model: org/b\n"


def token(source: str, more: str = "") -> str:
    return f"tokenizer:\n  source: union\n  tokens:\n    <x>:\n      source: {source}\n{more}"


WRONG: dict[str, tuple[str, str]] = {
    "both": ("tokenizer_source: base\ntokenizer: {source: union}\n", "7: `tokenizer` and `tokenizer_source` say"),
    "source is a number": ("tokenizer_source: 5\n", "6: `base`, `union` or a model is due here"),
    "source is no model": ("tokenizer_source: onion pie\n", "6: 'onion pie' is neither a folder"),
    "source is an unknown form": ("tokenizer_source: {path: a/b, lora: c}\n", "6: unknown key lora of a model"),
    "tokenizer is a word": ("tokenizer: union\n", "6: `tokenizer` is a mapping with source, tokens, pad"),
    "typo": ("tokenizer:\n  source: union\n  token: {}\n", "8: unknown key 'token'; there are: source, tokens, pad"),
    "typo of a token": (token("org/a", "      forse: true\n"), "11: unknown key 'forse'; there are: source, force"),
    "force is text": (token("org/a", "      force: 'yes'\n"), "11: `force`: input should be a valid boolean"),
    "a token is a word": ("tokenizer:\n  tokens:\n    <x>: zero\n", "8: `<x>` is a mapping with source, force"),
    "padding to nothing": ("tokenizer:\n  pad_to_multiple_of: 0\n", "7: `pad_to_multiple_of`: input should be greater"),
    "padding to a fraction": ("tokenizer:\n  pad_to_multiple_of: 1.5\n", "7: `pad_to_multiple_of`: input should be"),
    "a model that is not merged": (token("org/c"), "10: org/c is not a model of this recipe; there are: org/a, org/b"),
    "a source that is a number": (token("7"), "10: a model is due here"),
    "a kind": (token("{kind: mean}"), "10: `kind` is `zero` or `model_token`, not 'mean'"),
    "a kind's key": (token("{kind: zero, token: x}"), "10: unknown key 'token'; there are: kind"),
    "no model": (token("{kind: model_token, token: x}"), "10: `model` is missing"),
    "no token": (token("{kind: model_token, model: org/a}"), "10: `model_token` takes one of `token` and `token_id`"),
    "two tokens": (
        token("{kind: model_token, model: org/a, token: x, token_id: 3}"), "10: `model_token` takes one of `token`"
    ),
    "a negative id": (token("{kind: model_token, model: org/a, token_id: -1}"), "10: `token_id`: input should be"),
    "a model_token of another model": (
        token("{kind: model_token, model: org/c, token_id: 1}"), "10: org/c is not a model of this recipe"
    ),
    "an unknown template": (
        "chat_template: vicuna\n", "6: no chat template 'vicuna'; there are: auto, alpaca, chatml, exaone"
    ),
    "a template that is no jinja": ("chat_template: '{% for x %}'\n", "6: the chat template is not jinja: expected"),
    "a template that is a list": ("chat_template: [a]\n", "6: `chat_template`: input should be a valid string"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_setting_is_refused_with_its_line(what: str) -> None:
    text, expected = WRONG[what]
    with pytest.raises(RecipeError) as refused:
        ctl_merge.parse_recipe(LINEAR + text)
    _, *lines = str(refused.value).splitlines()
    assert len(lines) == 1 and lines[0].removeprefix("  line ").startswith(expected), refused.value


def test_all_wrong_settings_are_told_at_once() -> None:
    text = (
        "tokenizer:\n  source: onion pie\n  tokens:\n    <x>: {source: org/c}\n    <y>: {forse: 1}\nchat_template: x\n"
    )
    with pytest.raises(RecipeError, match=r"4 problem\(s\)"):
        ctl_merge.parse_recipe(LINEAR + text)


def test_the_schema_knows_the_settings() -> None:
    schema = Draft202012Validator(recipe_schema())
    data = yaml.safe_load(LINEAR)
    for source in ("org/a", {"kind": "zero"}, {"kind": "model_token", "model": {"path": "org/a"}, "token_id": 3}):
        tokenizer = {"source": "union", "tokens": {"<x>": {"source": source, "force": True}}, "pad_to_multiple_of": 8}
        assert schema.is_valid({**data, "tokenizer": tokenizer, "chat_template": "auto"}), source
    beyond = {"both", "source is no model", "source is an unknown form", "a model that is not merged", "a kind",
              "a kind's key", "no model", "no token", "two tokens", "a negative id", "a model_token of another model",
              "an unknown template", "a template that is no jinja"}  # fmt: skip
    for what in WRONG.keys() - beyond:
        assert not schema.is_valid({**data, **yaml.safe_load(WRONG[what][0])}), what


def test_a_setting_has_defaults_and_an_empty_one_is_the_union() -> None:
    assert ctl_merge.parse_recipe(LINEAR).tokenizer == TokenizerSetting()
    assert ctl_merge.parse_recipe(LINEAR + "tokenizer: {}\n").tokenizer.source == "union"
    named = ctl_merge.parse_recipe(LINEAR + "tokenizer_source: {model: {path: org/c, revision: v1}}\n").tokenizer
    assert str(named.source) == "org/c@v1"
    assert ctl_merge.parse_recipe(LINEAR + "chat_template: '{% generation %}{% endgeneration %}'\n")


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ({"<zzz>": {}}, r"no model has the token '<zzz>': give it a `source`"),
        ({"<s>": {"source": "COD"}}, r"coder has no token '<s>', which '<s>' is to be taken from"),
        (
            {"a": {"source": {"kind": "model_token", "model": "COD", "token": "<nix>"}}},
            r"coder has no token '<nix>', which 'a' is to be taken from",
        ),
        (
            {"a": {"source": {"kind": "model_token", "model": "COD", "token_id": 310}}},
            r"of .*coder has 310 rows: there is no row 310, which 'a' is to be taken from",
        ),
    ],
)
def test_tokens_that_no_model_has_are_refused(
    tokens: dict, reason: str, pair: tuple[Path, Path], merged: Merged
) -> None:
    with pytest.raises(MismatchError, match=reason):
        merged(*pair, tokenizer={"source": "union", "tokens": with_folders(tokens, pair)})


def test_a_vocabulary_without_a_table_cannot_be_changed(tmp_path: Path, merged: Merged) -> None:
    folders = [write_checkpoint(tmp_path / f"{i}", {"w": torch.ones(2)}) for i in range(2)]
    with pytest.raises(MismatchError, match="has no table of as many rows as the `vocab_size`"):
        merged(*folders, tokenizer={"source": "base", "pad_to_multiple_of": 8})
