"""A probe's statistics on disk, what is computed from them again, and the schema of what is said."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from pydantic import ValidationError

import ctl_merge
from ctl_merge.errors import ProbeError
from ctl_merge.probing import archive
from ctl_merge.probing.schema import Report, Row

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
BASE, CYCLE, SHIFT = (str(QUICKSTART / name) for name in ("base", "cycle", "shift"))
SMALL = {"sequences": 3, "length": 24}


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_model() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> ctl_merge.ProbeReport:
    """A probe with all that can be asked for: rows with a null, prompt and response, bfloat16 written."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"q": "cycle: abcd ->", "a": " dabc"}, {"q": None, "a": "lost"}] * 30
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (QUICKSTART / "ties.yaml").read_text() + "dtype: bfloat16\n"
    recipe = ctl_merge.parse_recipe(text, relative_to=QUICKSTART)
    data = [f"rows={folder / 'rows.jsonl'}:q,a", f"bare={folder / 'rows.jsonl'}:a"]
    return ctl_merge.probe(recipe, data, patch=True, null=True, scaling=True, **SMALL)


@pytest.fixture(scope="module")
def sweep() -> ctl_merge.ProbeReport:
    return ctl_merge.probe_pair([CYCLE, SHIFT], BASE, alphas=[0.25, 0.5], **SMALL)


@pytest.fixture(scope="module")
def in_memory() -> ctl_merge.ProbeReport:
    from transformers import AutoModelForCausalLM

    base, cycle, shift = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (BASE, CYCLE, SHIFT)
    )
    merged = ctl_merge.load_model(QUICKSTART / "average.yaml")
    with ctl_merge.observing(base, {"cycle": cycle, "shift": shift}, {"merged": merged}) as seen:
        seen.run(torch.arange(3, 27).view(1, -1))
        return seen.report()


REPORTS = ["everything", "sweep", "in_memory"]


@pytest.fixture
def report(request: pytest.FixtureRequest) -> ctl_merge.ProbeReport:
    return request.getfixturevalue(request.param)


# ---- the report again


@pytest.mark.parametrize("report", REPORTS, indirect=True)
def test_a_report_is_computed_again_from_what_was_saved(report: ctl_merge.ProbeReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    (tmp_path / "probe.json").rename(tmp_path / "told.json")  # is not read
    again = ctl_merge.ProbeReport.load(tmp_path)
    assert again.to_json() == (tmp_path / "told.json").read_text("utf-8") == report.to_json()
    assert again.rows[0].keys() == report.rows[0].keys()


def test_anyone_can_compute_a_number_from_the_file(everything: ctl_merge.ProbeReport, tmp_path: Path) -> None:
    """R of a block and the loss of the merge, with NumPy alone."""
    everything.save(tmp_path)
    row = next(row for row in everything.rows if row["block"] == "model.layers.2" and row["set"] == "rows")
    with np.load(tmp_path / "statistics.npz", allow_pickle=False) as arrays:
        header = json.loads(str(arrays["header"]))
        sources = header["sets"]["rows"]["sites"]["model.layers.2"]["sources"]
        gram = arrays["sets/rows/model.layers.2/gram"].sum((0, 1))
        c = arrays["sets/rows/model.layers.2/coefficients"][0]
        losses = arrays["sets/rows/losses/nll"].sum(1) / arrays["sets/rows/losses/tokens"].sum()
    shares = np.array([1 - c.sum(), *c])
    centre = np.zeros(len(sources))
    centre[:3] = shares
    away = np.eye(len(sources)) - centre
    apart = sum(abs(a) * away[i] @ gram @ away[i] for i, a in enumerate(shares))
    own = away[sources.index("merged")]
    assert row["nonlinearity"] == pytest.approx(np.sqrt(own @ gram @ own / apart), rel=1e-6)
    models = dict(zip(header["sets"]["rows"]["losses"]["models"], losses, strict=True))
    nll = everything.data["sets"]["rows"]["losses"]["nll"]
    assert nll["merged"]["value"] == pytest.approx(models["merged"])
    assert len(header["warnings"]) == len(everything.data["warnings"])


# ---- what the report says


@pytest.mark.parametrize("report", REPORTS, indirect=True)
def test_probe_json_is_what_its_schema_says(report: ctl_merge.ProbeReport) -> None:
    data = json.loads(report.to_json())
    Report.model_validate(data)
    jsonschema.validate(data, Report.model_json_schema())
    with pytest.raises(ValidationError):
        Report.model_validate({**data, "more": 1})
    for field in (name for name, field in Report.model_fields.items() if field.is_required()):
        with pytest.raises(ValidationError):
            Report.model_validate({key: value for key, value in data.items() if key != field})


def test_the_schema_names_no_number_that_no_report_has(request: pytest.FixtureRequest) -> None:
    rows = [row for name in REPORTS for row in request.getfixturevalue(name).rows]
    for name in Row.model_fields:
        assert any(row.get(name) is not None for row in rows), name


def test_prompt_and_response_are_told_apart(everything: ctl_merge.ProbeReport) -> None:
    roles, bare = everything.data["sets"]["rows"], everything.data["sets"]["bare"]
    assert list(roles["strata"]) == ["first", "delimiter", "prompt", "response"]
    assert list(bare["strata"]) == ["first", "delimiter", "other"]
    assert roles["skipped_rows"] > 0 == bare["skipped_rows"]
    assert sum(roles["strata"].values()) == roles["tokens"] == 72
    for row in roles["blocks"]:
        assert list(row["by_stratum"]) == list(roles["strata"])
    assert all(value > 0 for value in roles["blocks"][-1]["by_stratum"].values())


def test_every_interval_is_one(everything: ctl_merge.ProbeReport) -> None:
    """Its ends are in order; of means over sequences, around the number."""
    for row in everything.rows:
        for name in (key.removesuffix("_low") for key in row if key.endswith("_low")):
            ends = [row[f"{name}_low"], row[name], row[f"{name}_high"]]
            for low, value, high in zip(*(x.values() if isinstance(x, dict) else [x] for x in ends), strict=True):
                if value is not None and np.isfinite(low):
                    assert low <= high and (name not in ("cos", "coef") or low <= value <= high), (row["block"], name)


# ---- files from elsewhere


@pytest.fixture(scope="module")
def arrays(everything: ctl_merge.ProbeReport, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("saved")
    everything.save(folder)
    with np.load(folder / "statistics.npz", allow_pickle=False) as found:
        return dict(found)


def altered(arrays: dict[str, np.ndarray], **changes: Any) -> dict[str, np.ndarray]:
    """With keys of the header changed."""
    header = json.loads(str(arrays["header"]))
    return {**arrays, "header": np.array(json.dumps(header | changes))}


GRAM = "sets/rows/model.layers.0/gram"
HOSTILE: dict[str, Callable[[dict[str, np.ndarray]], dict[str, Any]]] = {
    "no header": lambda a: {k: v for k, v in a.items() if k != "header"},
    "header of something else": lambda a: {**a, "header": np.array("[1, 2")},
    "header of depth": lambda a: {**a, "header": np.array("[" * 100_000)},
    "header of numbers": lambda a: {**a, "header": np.zeros(3)},
    "other format": lambda a: altered(a, format=99),
    "unknown key": lambda a: altered(a, run="rm"),
    "no merges": lambda a: altered(a, merges={}),
    "notes that say more": lambda a: altered(a, merges={"merged": {"name": "other"}}),
    "one parent more": lambda a: altered(a, parents=["cycle", "shift", "third"]),
    "no tensors": lambda a: altered(a, tensors=[]),
    "patch of nobody": lambda a: altered(a, patches={"nobody": {"x": "y"}}),
    "patch by nobody": lambda a: altered(a, patches={"merged": {"model.layers.0": "nobody"}}),
    "scale of other sets": lambda a: altered(a, scaled={"0.5": {}}),
    "scale that is none": lambda a: altered(a, scaled={"nan": json.loads(str(a["header"]))["scaled"]["0.5"]}),
    "no gram": lambda a: {k: v for k, v in a.items() if k != GRAM},
    "gram of objects": lambda a: {**a, GRAM: np.array([{"a": 1}], dtype=object)},
    "gram of texts": lambda a: {**a, GRAM: np.array(["x"])},
    "gram of another shape": lambda a: {**a, GRAM: a[GRAM][:, :, 1:]},
    "fewer sequences": lambda a: {**a, GRAM: a[GRAM][:1]},
    "no sequences": lambda a: {**a, "sets/rows/tokens": a["sets/rows/tokens"][:0]},
    "float32": lambda a: {**a, GRAM: a[GRAM].astype("float32")},
    "no coefficients": lambda a: {**a, GRAM.replace("gram", "coefficients"): np.zeros((0, 2))},
    "losses of fewer": lambda a: {**a, "sets/rows/losses/nll": a["sets/rows/losses/nll"][1:]},
    "weights of fewer": lambda a: {**a, "weights/grams": a["weights/grams"][:, 1:, 1:]},
}  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_does_not_fit_is_refused(change: Callable, arrays: dict, tmp_path: Path) -> None:
    np.savez(tmp_path / "statistics.npz", **change(arrays))
    with pytest.raises(ProbeError, match="is not the statistics of a probe, or damaged"):
        ctl_merge.ProbeReport.load(tmp_path)


def test_a_file_that_is_unaltered_is_read(arrays: dict, tmp_path: Path) -> None:
    """So that the refusals above are for what was changed."""
    np.savez(tmp_path / "statistics.npz", **altered(arrays))
    assert ctl_merge.ProbeReport.load(tmp_path).rows


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("run",)


def test_nothing_in_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "statistics.npz").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ProbeError):
        ctl_merge.ProbeReport.load(tmp_path)
    with zipfile.ZipFile(tmp_path / "statistics.npz", "w") as file:
        file.writestr("header.npy", pickle.dumps(Evil()))
    with pytest.raises(ProbeError):
        ctl_merge.ProbeReport.load(tmp_path)
    assert "run" not in capsys.readouterr().out


def test_a_file_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "statistics.npz", header=np.zeros(1 << 24))
    with pytest.raises(ProbeError, match="would expand from"):
        ctl_merge.ProbeReport.load(tmp_path)


def test_a_damaged_file_is_told(everything: ctl_merge.ProbeReport, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    archive.save(everything.statistics, path)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:2000] + bytes(500) + whole[2500:]):
        path.write_bytes(content)
        with pytest.raises(ProbeError, match="probe again"):
            ctl_merge.ProbeReport.load(tmp_path)


def test_a_folder_without_statistics_is_told(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="is not there"):
        ctl_merge.ProbeReport.load(tmp_path)
