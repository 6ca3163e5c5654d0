"""A probe's statistics as a file, checked when read.

`statistics.npz` holds arrays and no pickles: `numpy.load(path, allow_pickle=False)` reads it.

    header                            JSON: names, settings, what tuning found, each data set's strata and sites
    weights/grams (T, W, W)           inner products of [τ_1 .. τ_k, θ_0, τ_m ..] for each tensor
    sets/NAME/tokens (N, S)           tokens by sequence and stratum
    sets/NAME/SITE/gram (N, S, M, M)  inner products of features, summed over tokens; `robust` without massive ones
    sets/NAME/SITE/cosines, tokens    per-token cosines summed over tokens (N, S, P), and how many (N, S)
    sets/NAME/SITE/coefficients       of each rider (R, k); `explained` (R,), where the site belongs to a block
    sets/NAME/losses/nll              of each model, summed over the tokens of a sequence (models, N)
    sets/NAME/losses/…                ensemble, kl, agree of each merge (merges, N); tokens (N,)
    scaled/SCALE/NAME/…               the same for task vectors of SCALE times their size
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ctl_merge.deferred import torch
from ctl_merge.errors import ProbeError
from ctl_merge.probing.grams import Grams, SiteGrams
from ctl_merge.probing.losses import Losses
from ctl_merge.probing.observer import BASE, Observations
from ctl_merge.probing.statistics import Statistics
from ctl_merge.weights import TaskGrams

FILE = "statistics.npz"
FORMAT = 1
_MOST_EXPANSION = 50  # statistics compress to a half; a file that expands more than this is no file of ours
_SMALL = 1 << 26
_MOST_SEQUENCES = 1 << 16


def save(statistics: Statistics, path: Path) -> None:
    """Write the file."""
    kinds = [("sets", statistics.sets), *((f"scaled/{s:g}", sets) for s, sets in statistics.scaled.items())]
    header = {
        "format": FORMAT, "ctl_merge": statistics.version, "base": statistics.base, "parents": statistics.parents,
        "merges": statistics.merges, "patches": statistics.patches, "settings": statistics.settings,
        "warnings": statistics.warnings, "tensors": list(statistics.weights.grams),
        "sets": {name: _described(found) for name, found in statistics.sets.items()},
        "scaled": {f"{s:g}": {n: _described(f) for n, f in sets.items()} for s, sets in statistics.scaled.items()},
    }  # fmt: skip
    if statistics.tuning is not None:
        header["tuning"] = statistics.tuning
    arrays = {"header": np.array(json.dumps(header, ensure_ascii=False))}
    arrays["weights/grams"] = np.stack(list(statistics.weights.grams.values()))
    for prefix, sets in kinds:
        for name, found in sets.items():
            arrays |= {f"{prefix}/{name}/{key}": array for key, array in _arrays(found)}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def load(path: Path) -> Statistics:
    """Read the file; nothing in it is run. Raises ProbeError where it is missing, damaged, or something else."""
    try:
        _refuse_bombs(path)
        with np.load(path, allow_pickle=False) as arrays:
            return _Reader(arrays).read()
    except FileNotFoundError:
        raise ProbeError(f"{path} is not there: it is in the folder that `ctl-merge probe -o` writes") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, MemoryError, NotImplementedError,
            RuntimeError, zipfile.BadZipFile, zlib.error, SyntaxError) as error:  # fmt: skip
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ProbeError(f"{path} is not the statistics of a probe, or damaged ({reason}): probe again") from None


def _described(found: Observations) -> dict[str, Any]:
    losses = found.losses and {"models": found.losses.models, "riders": found.losses.riders}
    sites = {site: {"sources": grams.sources, "massive": grams.massive} for site, grams in found.grams.sites.items()}
    return {"strata": found.grams.strata, "skipped": found.skipped, "sites": sites, "losses": losses}


def _arrays(found: Observations) -> Iterator[tuple[str, np.ndarray]]:
    yield "tokens", torch.stack(found.grams.tokens).double().numpy()
    for site, grams in found.grams.sites.items():
        for name in ("gram", "robust", "cosines", "tokens"):
            yield f"{site}/{name}", torch.stack(getattr(grams, name)).double().numpy()
        yield f"{site}/coefficients", np.stack(found.coefficients[site])
        if site in found.explained:
            yield f"{site}/explained", np.array(found.explained[site])
    if found.losses:
        yield "losses/tokens", np.array(found.losses.tokens, float)
        for name in ("nll", "ensemble", "kl", "agree"):
            table = getattr(found.losses, name)
            yield f"losses/{name}", np.array([table[key] for key in found.losses.names(name)], float)


def _refuse_bombs(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        size, expanded = path.stat().st_size, sum(entry.file_size for entry in archive.infolist())
    if expanded > _MOST_EXPANSION * size + _SMALL:
        raise ValueError(f"it would expand from {size:,} to {expanded:,} bytes")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _SiteHeader(_Strict):
    sources: list[str]
    massive: list[int]


class _LossHeader(_Strict):
    models: list[str]
    riders: list[str]


class _SetHeader(_Strict):
    strata: list[str] = Field(min_length=1)
    skipped: int
    sites: dict[str, _SiteHeader]
    losses: _LossHeader | None


class _Notes(_Strict):
    method: str | None = None
    recipe: str | None = None
    alpha: float | None = None
    main: bool | None = None


class _Evaluation(BaseModel):
    rows: list[dict[str, Any]]
    sets: dict[str, str]


class _Tuning(BaseModel):
    """What the page reads of it; the rest is as `tune --json` has it."""

    verdict: str
    uniform: float | None
    coefficients: list[dict[str, Any]]
    evaluation: _Evaluation


class _Header(_Strict):
    format: int
    ctl_merge: str
    base: str
    parents: list[str]
    merges: dict[str, _Notes] = Field(min_length=1)
    patches: dict[str, dict[str, str]]
    settings: dict[str, Any]
    warnings: list[str]
    tensors: list[str] = Field(min_length=1)
    sets: dict[str, _SetHeader]
    scaled: dict[str, dict[str, _SetHeader]]
    tuning: dict[str, Any] | None = None

    @field_validator("tuning")
    @classmethod
    def _checked(cls, tuning: dict[str, Any] | None) -> dict[str, Any] | None:
        if tuning is not None:
            _Tuning.model_validate(tuning)
        return tuning


class _Reader:
    """Checks every array against the header. Raises ValueError, as NumPy and pydantic do."""

    def __init__(self, arrays: Any) -> None:
        self.arrays = arrays
        try:
            self.header = _Header.model_validate(json.loads(str(arrays["header"])))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"header, {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if self.header.format != FORMAT:
            raise ValueError(f"format {self.header.format} is of another version; this one reads {FORMAT}")

    def read(self) -> Statistics:
        header = self.header
        width = len(header.parents) + 1 + len(header.merges)
        grams = self._array("weights/grams", len(header.tensors), width, width)
        if not set(header.patches) <= set(header.merges):
            raise ValueError("patches of a merge that is not there")
        notes = {name: own.model_dump(exclude_none=True) for name, own in header.merges.items()}
        return Statistics(
            header.base, header.parents, notes,
            TaskGrams(len(header.parents), dict(zip(header.tensors, grams, strict=True))),
            {name: self._set(f"sets/{name}", found, list(header.merges)) for name, found in header.sets.items()},
            header.patches, {float(scale): self._scaled(scale, sets) for scale, sets in header.scaled.items()},
            header.settings, header.warnings, header.ctl_merge, header.tuning,
        )  # fmt: skip

    def _scaled(self, scale: str, sets: Mapping[str, _SetHeader]) -> dict[str, Observations]:
        if set(sets) != set(self.header.sets) or not 0 < float(scale) < 1:
            raise ValueError(f"scale {scale} does not fit the data sets")
        merges = list(self.header.merges)
        main = next((name for name in merges if self.header.merges[name].main), merges[0])
        return {name: self._set(f"scaled/{scale}/{name}", found, [main]) for name, found in sets.items()}

    def _set(self, prefix: str, header: _SetHeader, merges: list[str]) -> Observations:
        strata = len(header.strata)
        tokens = self._array(f"{prefix}/tokens", -1, strata)
        if not 0 < len(tokens) <= _MOST_SEQUENCES:
            raise ValueError(f"{prefix} has {len(tokens):,} sequences")
        found = Observations(Grams(header.strata, tokens=_rows(tokens)), None, skipped=header.skipped)
        for site, own in header.sites.items():
            self._site(f"{prefix}/{site}", site, own, merges, found)
        if header.losses:
            found.losses = self._losses(f"{prefix}/losses", header.losses, merges, len(tokens))
        return found

    def _site(self, prefix: str, site: str, header: _SiteHeader, merges: Sequence[str], found: Observations) -> None:
        known, sources = [BASE, *self.header.parents], len(header.sources)
        if header.sources[: len(known)] != known or not set(merges) <= set(header.sources):
            raise ValueError(f"{prefix} lacks the base, a parent or a merge")
        shape = (len(found.grams.tokens), len(found.grams.strata))
        grams = SiteGrams(header.sources, header.massive)
        for name, more in (("gram", (sources, sources)), ("robust", (sources, sources)), ("cosines", (-1,)),
                           ("tokens", ())):  # fmt: skip
            setattr(grams, name, _rows(self._array(f"{prefix}/{name}", *shape, *more)))
        if grams.cosines[0].shape[1] < len(merges):
            raise ValueError(f"{prefix}/cosines lacks a merge")
        found.grams.sites[site] = grams
        found.coefficients[site] = list(self._array(f"{prefix}/coefficients", -1, len(known) - 1))
        if f"{prefix}/explained" in self.arrays:
            found.explained[site] = self._array(f"{prefix}/explained", -1).tolist()
        if not len(merges) <= len(found.coefficients[site]) == len(found.explained.get(site, found.coefficients[site])):
            raise ValueError(f"{prefix} lacks the coefficients of a merge")

    def _losses(self, prefix: str, header: _LossHeader, merges: Sequence[str], count: int) -> Losses:
        models = {BASE, *self.header.parents, *merges}
        patched = {model for sites in self.header.patches.values() for model in sites.values()}
        if not models <= set(header.models) or not set(merges) <= set(header.riders):
            raise ValueError(f"{prefix} lacks a model")
        if prefix.startswith("sets/") and not patched <= set(header.models):
            raise ValueError(f"{prefix} lacks a patched model")
        losses = Losses(header.models, header.riders)
        losses.tokens = self._array(f"{prefix}/tokens", count).astype(int).tolist()
        for name in ("nll", "ensemble", "kl", "agree"):
            names = losses.names(name)
            table = self._array(f"{prefix}/{name}", len(names), count).tolist()
            getattr(losses, name).update(zip(names, table, strict=True))
        return losses

    def _array(self, key: str, *shape: int) -> np.ndarray:
        found = self.arrays[key]
        fits = found.ndim == len(shape) and all(w in (-1, n) for w, n in zip(shape, found.shape, strict=True))
        if found.dtype != np.float64 or not fits:
            raise ValueError(f"{key} is {found.dtype} {found.shape}, not float64 {shape}")
        return found


_rows: Callable[[np.ndarray], list[torch.Tensor]] = lambda array: list(torch.from_numpy(array))  # noqa: E731
