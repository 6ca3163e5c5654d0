"""What a terminal would obey never reaches it, whatever models, files and recipes are called."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import recipe_text
from command import Ctl

from ctl_merge.cli import terminal
from ctl_merge.shown import inert, inert_json

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
# Escape, title, 8-bit CSI and OSC, right-to-left, a line end, an unseen tag, markup, half a character
EVIL = "\x1b[2J\x1b]0;t\x07\x9b31m\x9d8;;x\x9c\u202e\u2066\u2028\U000e0041[link=file:x]n[bold]\x7f"
OBEYED = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff\U000e0000-\U000e007f]"
)


def test_inert_text_and_json_of_every_character() -> None:
    everything = "".join(map(chr, [*range(0x3000), *range(0xDC80, 0xDD00), 0xFEFF, *range(0xE0000, 0xE0080)]))
    assert not OBEYED.search(inert(everything).replace("\t", ""))
    document = inert_json(json.dumps({everything: everything}, ensure_ascii=False))
    assert not OBEYED.search(document) and json.loads(document) == {everything: everything}
    assert inert("naïve 名 👩‍💻\n\tx") == "naïve 名 👩‍💻\n\tx"


def test_every_way_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table(title=EVIL, caption=EVIL)
    table.add_column(EVIL, overflow="fold")
    table.add_row(EVIL + "\udcff")
    terminal.print_table(table)
    terminal.print_text(EVIL)
    terminal.print_sections([(EVIL, [EVIL])])
    terminal.print_json({EVIL: EVIL})
    terminal.say(EVIL)
    terminal.say(EVIL, error=True)
    terminal.configure()
    terminal.warn([EVIL])
    said = capsys.readouterr()
    assert not OBEYED.search(said.out) and not OBEYED.search(said.err)
    assert said.out.count("\\x1b") >= 5 and said.err.count("\\x1b") >= 2


def test_verbs_print_in_no_other_way() -> None:
    """But for the version and a process' own errors, which go through `shown`."""
    cli = Path(terminal.__file__).parent
    printing = {
        path.name for path in cli.glob("*.py") if re.search(r"(?<![\w.])print\(|std(out|err)\.write", path.read_text())
    }
    assert printing == {"terminal.py", "__init__.py"}


def hostile(tmp_path: Path, name_of: str) -> list[Path]:
    """Models whose configs, cards and files have hostile names in them; of their folders, what is given."""
    found = []
    for name in ("base", "cycle", "shift"):
        folder = shutil.copytree(QUICKSTART / name, tmp_path / f"{name}{name_of}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": EVIL}))
        front = yaml.safe_dump({"base_model": f"org/{EVIL}", "license": EVIL, "tags": [EVIL]})
        (folder / "README.md").write_text(f"---\n{front}---\n")
        (folder / f"LICENSE{EVIL}").write_text("x")
        found.append(folder)
    return found


@pytest.mark.parametrize("name_of", [EVIL, "[bold]"], ids=["folders too", "what is in them"])
def test_verbs_with_hostile_names(name_of: str, tmp_path: Path, ctl: Ctl) -> None:
    """Folders that a terminal would obey are refused in words by most verbs; the others are worked on."""
    models = hostile(tmp_path, name_of)
    base, *experts = models
    recipe, output, adapter = tmp_path / f"r{name_of}.yaml", tmp_path / f"out{EVIL}", tmp_path / f"lora{EVIL}"
    rows: dict[Any, dict[str, float]] = {f"NAME{i}": {"weight": 0.5} for i in range(2)}
    text = recipe_text("task_arithmetic", [*rows.items()], base="NAME2")
    for i, folder in enumerate((*experts, base)):
        text = text.replace(f"NAME{i}", json.dumps(str(folder)))
    recipe.write_text(text)
    commands: list[tuple[Any, ...]] = [
        ("check", recipe), (recipe, "--dry-run"), (recipe, "-o", output), (recipe, "-o", output),
        ("compare", recipe), ("compare", recipe, "--by", "tensor"), ("verify", output),
        ("init", *experts, "--base", base, "-o", tmp_path / f"made{EVIL}", "--overwrite"), 
        ("init", *models, "-o", tmp_path / "made.yaml", "--overwrite"),
        ("extract-lora", experts[0], "--base", base, "-o", adapter, "--overwrite"), ("verify", adapter),
        ("reproduce", output, "--source", f"nothing{EVIL}={tmp_path}"), ("push", output, f"org/{EVIL}", "--dry-run"),
        ("methods",), ("verify", base), ("finalize", recipe, "-o", tmp_path / f"parts{EVIL}"),
        (recipe, "-o", tmp_path / f"parts{EVIL}", "--shard-rank", 0, "--shard-world", 1),
        ("finalize", recipe, "-o", tmp_path / f"parts{EVIL}"),
    ]  # fmt: skip
    done: set[str] = set()
    for command in commands:
        for more in ((), ("--json",)):
            ran = ctl(*command, *more)
            assert not OBEYED.search(ran.out), (command, ran.out)
            assert not OBEYED.search(ran.err), (command, ran.err)
            assert ran.code in (0, 2, 3), (command, ran.err)
            if ran.code == 0:
                done.add(str(command[0]))
                if more:
                    json.loads(ran.out)
    if name_of == EVIL:
        return
    (output / f"more{EVIL}").write_text("x")
    for more in ((), ("--json",)):
        ran = ctl("verify", output, *more)
        assert ran.code == 0 and "more\\" in ran.out and not OBEYED.search(ran.out + ran.err)
    assert {"check", str(recipe), "compare", "verify", "extract-lora", "init", "methods"} <= done


def test_verbs_that_run_models_with_hostile_names(tmp_path: Path, ctl: Ctl) -> None:
    """Of tasks, texts, models and outputs: inert on the terminal and in pages, and nothing is written elsewhere."""
    models = hostile(tmp_path / "models", "[bold]")
    base, *experts = models
    recipe, outside = tmp_path / "r.yaml", set(tmp_path.rglob("*"))
    recipe.write_text(recipe_text("task_arithmetic", [(path, {"weight": 0.5}) for path in experts], base=base))
    texts = tmp_path / f"t{EVIL}.txt"
    texts.write_text("a b c d e f g h\n\n" * 300)
    work = tmp_path / "work"
    work.mkdir()
    outputs, small = (work / f"o{EVIL}", work / "o"), ("--sequences", 2, "--length", 16)
    commands: list[tuple[Any, ...]] = []
    for output in outputs:
        commands += [
            ("probe", recipe, "--data", f"../{EVIL}={texts}", *small, "-o", output),
            ("evaluate", recipe, "--data", f"../../{EVIL}={texts}", *small, "-o", output.with_suffix(".json")),
            ("tune", recipe, "--data", f"../{EVIL}={texts}", *small, "-o", output.with_suffix(".yaml")),
            ("compare", recipe, "--by", f"../{EVIL}"), ("push", output, f"../{EVIL}"), ("verify", output),
        ]  # fmt: skip
    tame = shutil.copyfile(texts, tmp_path / "tame[bold].txt")
    outside.add(tame)
    commands += [
        ("probe", recipe, "--data", f"{tame}", *small, "-o", outputs[1]),
        ("evaluate", recipe, "--data", f"{tame}", *small, "-o", outputs[1].with_suffix(".json")),
    ]
    commands += [("probe", "--models", *[f"{path}{EVIL}" for path in experts], "--base", base, "-o", outputs[0])]
    codes, said = set(), []
    for command in commands:
        ran = ctl(*command)
        assert not OBEYED.search(ran.out) and not OBEYED.search(ran.err), (command, ran)
        assert ran.code in (0, 2, 3) and "Traceback" not in ran.err, (command, ran)
        codes.add((str(command[0]), ran.code))
        said.append(ran.err[-300:])
    assert {("probe", 0), ("evaluate", 0)} <= codes, said
    written = set(tmp_path.rglob("*")) - outside - {recipe, texts, work}
    assert written and all(path.is_relative_to(work) for path in written), written
    for page in work.rglob("report.html"):
        assert not OBEYED.search(page.read_text("utf-8"))
    for data in work.rglob("*.json"):  # the folder of the texts is nobody else's business
        assert str(tmp_path) not in data.read_text("utf-8"), data
