"""The windows of text that a probe is made on: rows, specs, strata."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ctl_merge.errors import DataError
from ctl_merge.probing.data import STRATA, TokenSet, load_tokens, strata_of
from ctl_merge.probing.rows import DataSpec

WORDS = [f"w{i}" for i in range(40)]
PUNCTUATION = [".", "!", "\n", "\n\n"]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token, line ends too, and a special token on either side unless it is told not to."""
    names = ["<unk>", "<s>", "</s>", *WORDS, *PUNCTUATION, "user", "assistant"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    lines = pre_tokenizers.Split(Regex("\n+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), lines])
    dressed = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.post_processor = dressed
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    found.chat_template = TEMPLATE
    return found


def words(windows: TokenSet, tokenizer: Any) -> list[list[str]]:
    return [tokenizer.convert_ids_to_tokens(row) for row in windows.ids.tolist()]


ROWS = [{"q": f"w{i} w{i + 1}", "n": i, "a": f"w{i + 2}"} for i in range(0, 30, 3)]
JOINED = [token for row in ROWS for token in (*row["q"].split(), "\n", row["a"], "\n\n")]


def write_rows(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        getattr(datasets.Dataset.from_list(ROWS), f"to_{suffix[1:]}")(str(path))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
@pytest.mark.parametrize("columns", [":q,a", ""], ids=["named", "all_texts"])
def test_windows_are_the_consecutive_tokens_of_rows_joined_by_a_blank_line(
    suffix: str, columns: str, tokenizer: Any, tmp_path: Path
) -> None:
    spec = DataSpec.parse(f"{write_rows(tmp_path, suffix)}{columns}")
    found = load_tokens(spec, tokenizer, 4, 6)
    assert words(found, tokenizer) == [JOINED[i : i + 6] for i in range(0, 24, 6)]
    assert found.name == "rows" and found.strata.shape == (4, 5, 6)
    everything = load_tokens(spec, tokenizer, 1000, 6)
    assert words(everything, tokenizer) == [JOINED[i : i + 6] for i in range(0, len(JOINED) // 6 * 6, 6)]


def test_columns_are_taken_in_the_order_of_the_spec(tokenizer: Any, tmp_path: Path) -> None:
    spec = DataSpec.parse(f"{write_rows(tmp_path, '.jsonl')}:a,q")
    assert words(load_tokens(spec, tokenizer, 1, 5), tokenizer) == [["w2", "\n", "w0", "w1", "\n\n"]]


def test_a_column_called_text_is_preferred(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "w1 w2 w3", "text": "w4 w5 w6"}) + "\n")
    found = load_tokens(DataSpec.parse(str(tmp_path / "rows.jsonl")), tokenizer, 1, 3)
    assert words(found, tokenizer) == [["w4", "w5", "w6"]]


def test_a_plain_text_is_taken_as_it_is(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("w1 w2 . w3\n\nw4 w5\nw6 ! w7 w8")
    found = load_tokens(DataSpec.parse(str(tmp_path / "plain.txt")), tokenizer, 9, 3)
    assert words(found, tokenizer) == [["w1", "w2", "."], ["w3", "\n\n", "w4"], ["w5", "\n", "w6"], ["!", "w7", "w8"]]


def test_chat_puts_columns_into_turns(tokenizer: Any, tmp_path: Path) -> None:
    spec = DataSpec.parse(f"{write_rows(tmp_path, '.jsonl')}:q,a")
    found = load_tokens(spec, tokenizer, 2, 5, chat=True)
    assert words(found, tokenizer) == [["user", "w0", "w1", "assistant", "w2"], ["user", "w3", "w4", "assistant", "w5"]]


def test_strata_are_first_token_delimiters_and_the_rest(tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer.convert_tokens_to_ids([".", "w1", "!", "\n\n", "w2"])] * 2)
    strata = strata_of(ids, tokenizer)
    assert strata.int().tolist() == [[[1, 0, 0, 0, 0], [0, 0, 1, 1, 0], [0] * 5, [0] * 5, [0, 1, 0, 0, 1]]] * 2
    assert torch.equal(strata.sum(1), torch.ones_like(ids))  # each token in one of them


@pytest.mark.parametrize(
    "text, expected",
    [
        ("data/test.jsonl", DataSpec("test", "data/test.jsonl")),
        ("math=test.jsonl:question,answer", DataSpec("math", "test.jsonl", ("question", "answer"))),
        ("wiki=org/set:text@validation", DataSpec("wiki", "org/set", ("text",), "validation")),
        ("org/set@test", DataSpec("set", "org/set", (), "test")),
        ("a.csv: x , y ,", DataSpec("a", "a.csv", ("x", "y"))),
    ],
)
def test_specs_are_name_source_columns_and_split(text: str, expected: DataSpec) -> None:
    assert DataSpec.parse(text) == expected


@pytest.mark.parametrize("text", ["", "name=", "=:column", ":column", "@split"])
def test_a_spec_without_a_source_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="names no data"):
        DataSpec.parse(text)


def test_too_little_text_names_the_set_and_what_to_do(tokenizer: Any, tmp_path: Path) -> None:
    spec = DataSpec.parse(f"small={write_rows(tmp_path, '.jsonl')}")
    with pytest.raises(DataError, match=r"^small: \d+ tokens are too few for one window of 999: use a smaller --len"):
        load_tokens(spec, tokenizer, 2, 999)


def test_an_unknown_column_is_named_with_those_that_exist(tokenizer: Any, tmp_path: Path) -> None:
    spec = DataSpec.parse(f"small={write_rows(tmp_path, '.jsonl')}:question")
    with pytest.raises(DataError, match="small has no column 'question'; it has: q, n, a"):
        load_tokens(spec, tokenizer, 2, 4)


@pytest.mark.parametrize("source", ["nowhere.jsonl", "nowhere.txt", "./no/where"])
def test_a_source_that_is_not_there_is_named(source: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=f"there is no file {source!r}"):
        load_tokens(DataSpec.parse(source), tokenizer, 2, 4)


@pytest.mark.parametrize("content", [b"PK\x03\x04\xff\xfe", b"w1 \0 w2\n"])
def test_a_kind_of_file_that_is_not_read_is_named(content: bytes, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(content)
    with pytest.raises(DataError, match=r"^a: .*a.docx cannot be read as UTF-8 text .*; rows are read from .jsonl"):
        load_tokens(DataSpec.parse(str(tmp_path / "a.docx")), tokenizer, 2, 4)


@pytest.mark.parametrize("name", ["val.fr", "README", "notes.md"])
def test_a_text_file_may_be_called_anything(name: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text("w1 w2\nw3 w4\n")
    found = load_tokens(DataSpec.parse(str(tmp_path / name)), tokenizer, 1, 6)
    assert words(found, tokenizer) == [["w1", "w2", "\n", "w3", "w4", "\n"]]


@pytest.mark.parametrize("tail, reason", [(":q,a", "no columns: leave :q,a out"), ("@test", "no split 'test'")])
def test_a_text_has_neither_columns_nor_splits(tail: str, reason: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1 w2 w3\n")
    with pytest.raises(DataError, match=reason):
        load_tokens(DataSpec.parse(f"{tmp_path / 'a.txt'}{tail}"), tokenizer, 1, 2)


@pytest.mark.parametrize(
    "text, name, asked",
    [("openai/gsm8k/main:q,a@test", "gsm8k", ("openai/gsm8k", "main", "test")),
     ("wikitext:q", "wikitext", ("wikitext", None, "train")), ("own=org/set:q", "own", ("org/set", None, "train"))],
)  # fmt: skip
def test_a_data_set_of_the_hub_is_streamed_by_name_configuration_and_split(
    text: str, name: str, asked: Sequence[Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def streamed(source: str, config: str | None, *, split: str, streaming: bool) -> Any:
        seen.append((source, config, split, streaming))
        yield from ROWS
        raise AssertionError("more rows were read than the windows need")

    monkeypatch.setattr(datasets, "load_dataset", streamed)
    found = load_tokens(DataSpec.parse(text), tokenizer, 2, 3)
    assert (found.name, seen) == (name, [(*asked, True)]) and found.ids.shape == (2, 3)


@pytest.mark.parametrize(
    "failure, reason",
    [(ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']"),
      r"\['main', 'socratic'\]: write openai/gsm8k/CONFIG\)"),
     (RuntimeError("Dataset scripts are no longer supported"), "no longer supported")],
    ids=["configuration", "script"],
)  # fmt: skip
def test_what_the_hub_does_not_give_is_told(
    failure: Exception, reason: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=reason):
        load_tokens(DataSpec.parse("openai/gsm8k:question"), tokenizer, 2, 4)


@pytest.mark.parametrize(
    "name, content, reason",
    [("bad.jsonl", b'{"text": "w1"}\n{"text": \n', "cannot be read"), ("bad.jsonl", b"", "is empty"),
     ("bad.txt", b"w1 \xff w2", "cannot be read")],
    ids=["malformed", "empty", "not_utf8"],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(
    name: str, content: bytes, reason: str, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"^bad: .*{name} {reason}"):
        load_tokens(DataSpec.parse(str(tmp_path / name)), tokenizer, 2, 4)


# ---- prompt and response


def marked(windows: TokenSet, tokenizer: Any) -> list[list[str]]:
    """Tokens with the stratum of each."""
    which = windows.strata.int().argmax(1)
    assert torch.equal(windows.strata.sum(1), torch.ones_like(windows.ids))
    rows = zip(words(windows, tokenizer), which.tolist(), strict=True)
    return [[f"{token}:{STRATA[i]}" for token, i in zip(*row, strict=True)] for row in rows]


def test_the_last_of_named_columns_is_the_response_and_the_others_the_prompt(tokenizer: Any, tmp_path: Path) -> None:
    found = load_tokens(DataSpec.parse(f"{write_rows(tmp_path, '.jsonl')}:q,a"), tokenizer, 2, 5)
    own = ["{}:first", "{}:prompt", "\n:delimiter", "{}:response", "\n\n:delimiter"]
    assert marked(found, tokenizer) == [
        [f.format(w) for f, w in zip(own, window, strict=True)] for window in (JOINED[:5], JOINED[5:10])
    ]


@pytest.mark.parametrize("columns", [":q", ""], ids=["one_column", "not_named"])
def test_columns_that_nobody_ordered_have_no_roles(columns: str, tokenizer: Any, tmp_path: Path) -> None:
    found = load_tokens(DataSpec.parse(f"{write_rows(tmp_path, '.jsonl')}{columns}"), tokenizer, 4, 5)
    assert not found.strata[:, 2:4].any()


@pytest.mark.parametrize(
    "template",
    [TEMPLATE, "{% for m in messages %}{{ m.role }} {{ m.content | trim }} {% endfor %}"],
    ids=["as_it_is", "stripped"],
)
def test_in_a_chat_the_assistants_words_are_the_response(
    template: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the user says `user` too, which is what the template writes in front."""
    monkeypatch.setattr(tokenizer, "chat_template", template)
    rows = [{"q": " w1 user ", "a": "assistant . w2"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_tokens(DataSpec.parse(f"{tmp_path / 'rows.jsonl'}:q,a"), tokenizer, 1, 7, chat=True)
    assert marked(found, tokenizer) == [
        ["user:first", "w1:prompt", "user:prompt", "assistant:other", "assistant:response", ".:delimiter",
         "w2:response"]
    ]  # fmt: skip


def test_a_template_that_rewrites_what_is_said_tells_no_roles(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("m.content", "m.content | replace('w1', 'w9')"))
    found = load_tokens(DataSpec.parse(f"{write_rows(tmp_path, '.jsonl')}:q,a"), tokenizer, 1, 5, chat=True)
    assert marked(found, tokenizer) == [["user:first", "w0:other", "w9:other", "assistant:other", "w2:other"]]


@pytest.mark.parametrize("columns", ["", ":messages", ":talk"])
def test_columns_of_messages_are_conversations(columns: str, tokenizer: Any, tmp_path: Path) -> None:
    said = [("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4")]
    messages = [{"role": role, "content": content} for role, content in said]
    row = {"text": "w9", "talk" if "talk" in columns else "messages": messages}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    spec = DataSpec.parse(f"{tmp_path / 'rows.jsonl'}{columns}")
    expected = ["user:first", "w1:prompt", "assistant:other", "w2:response", "user:other", "w3:prompt",
                "assistant:other", "w4:response"]  # fmt: skip
    assert marked(load_tokens(spec, tokenizer, 1, 8, chat=True), tokenizer) == [expected]
    if columns:
        with pytest.raises(DataError, match="holds a list, not text: use --chat"):
            load_tokens(spec, tokenizer, 1, 8)


def test_a_token_across_prompt_and_response_belongs_to_its_first_letter(tmp_path: Path) -> None:
    """`\n` and the response's first word are one token here."""
    names = {"<unk>": 0, "w1": 1, "\nw2": 2, "\n\n": 3}
    own = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Split(Regex("w1|\nw2|\n\n"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "w1", "a": "w2"}) + "\n")
    found = load_tokens(DataSpec.parse(f"{tmp_path / 'rows.jsonl'}:q,a"), tokenizer, 1, 3)
    assert marked(found, tokenizer) == [["w1:first", "\nw2:response", "\n\n:delimiter"]]


def test_a_chat_without_a_template_is_refused(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DataSpec.parse(f"{write_rows(tmp_path, '.jsonl')}:q,a")
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="no chat template"):
        load_tokens(spec, tokenizer, 2, 5, chat=True)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(DataError, match="the chat template refuses a row"):
        load_tokens(spec, tokenizer, 2, 5, chat=True)


# ---- special tokens


def test_special_tokens_stand_around_windows_whose_own_tokens_are_consecutive(tokenizer: Any, tmp_path: Path) -> None:
    spec = DataSpec.parse(f"{write_rows(tmp_path, '.jsonl')}:q,a")
    found = load_tokens(spec, tokenizer, 3, 6, special=True)
    assert words(found, tokenizer) == [["<s>", *JOINED[i : i + 4], "</s>"] for i in range(0, 12, 4)]
    assert marked(found, tokenizer)[0][-2:] == ["w2:response", "</s>:other"]
    plain = load_tokens(spec, tokenizer, 3, 4)
    assert torch.equal(found.ids[:, 1:-1], plain.ids)
    assert torch.equal(found.strata[:, 1:, 2:-1], plain.strata[:, 1:, 1:])


def test_special_tokens_that_there_are_none_of_are_refused(tmp_path: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "u": 1}, unk_token="u")))
    with pytest.raises(DataError, match="adds no special tokens"):
        load_tokens(DataSpec.parse(f"{write_rows(tmp_path, '.jsonl')}:q"), bare, 2, 5, special=True)


def test_a_window_of_nothing_but_special_tokens_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few for one window of 2"):
        load_tokens(DataSpec.parse(f"{write_rows(tmp_path, '.jsonl')}:q"), tokenizer, 2, 2, special=True)


# ---- nulls, and names that look like something else


def test_rows_with_a_null_are_skipped_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"q": "w1", "a": "w2"}, {"q": None, "a": "w3"}, {"q": "w4"}, {"q": "w5", "a": "w6"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_tokens(DataSpec.parse(f"{tmp_path / 'rows.jsonl'}:q,a"), tokenizer, 9, 4)
    assert words(found, tokenizer) == [["w1", "\n", "w2", "\n\n"], ["w5", "\n", "w6", "\n\n"]]
    assert found.skipped == 2
    chosen = load_tokens(DataSpec.parse(f"{tmp_path / 'rows.jsonl'}"), tokenizer, 9, 2)  # what is text in each row
    assert words(chosen, tokenizer)[:3] == [["w1", "\n"], ["w2", "\n\n"], ["w3", "\n\n"]] and chosen.skipped == 0


def test_nothing_but_nulls_is_told(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(3 * (json.dumps({"text": None, "n": 1}) + "\n"))
    with pytest.raises(DataError, match=r"0 tokens are too few .*3 rows were skipped: they hold a null"):
        load_tokens(DataSpec.parse(str(tmp_path / "rows.jsonl")), tokenizer, 1, 4)


ODD = ["a@b.jsonl", "x=1.jsonl", "C:d.jsonl", "lang=en@2/p:q.jsonl", "[a]*?.jsonl"]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("tail, columns", [("", ()), (":q,a", ("q", "a"))], ids=["bare", "columns"])
@pytest.mark.parametrize("name", ["", "own="])
def test_a_path_that_exists_wins(
    name: str, tail: str, columns: Sequence[str], odd: str, tokenizer: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path(odd).parent.mkdir(exist_ok=True, parents=True)
    for near in ("a", "1.jsonl", "d.jsonl", "x"):  # what the text would mean if the file were not there
        Path(near).write_text("wrong")
    write_rows(tmp_path, ".jsonl").rename(odd)
    spec = DataSpec.parse(f"{name}{odd}{tail}")
    assert spec == DataSpec(name[:-1] or Path(odd).stem, odd, tuple(columns))
    assert words(load_tokens(spec, tokenizer, 1, 5), tokenizer) == [JOINED[:5]]


def test_a_split_of_a_file_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a file and has no split 'test'"):
        load_tokens(DataSpec.parse(f"{write_rows(tmp_path, '.jsonl')}:q@test"), tokenizer, 2, 4)


def test_a_split_may_be_a_slice() -> None:
    assert DataSpec.parse("org/set:text@train[:10%]") == DataSpec("set", "org/set", ("text",), "train[:10%]")


def test_a_name_is_printable() -> None:
    with pytest.raises(DataError, match="printable"):
        DataSpec.parse("a\x00b=org/set")
