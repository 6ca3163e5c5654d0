"""What a comparison in weight space means, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

NEAR = 0.05  # of a task vector's norm: nearer to its end or to the base, a merge does nothing of its own
SAME = 0.01  # of the larger task vector's norm: parents that are nearer to each other count as the same
EXPLODED = 3.0  # times the largest parent's task vector
UNRELATED = 0.9  # cosine to the base below which a parent hardly comes from it
FAR = 0.1  # of the base's norm: a task vector far larger than those of ordinary finetunes
LOSSY = 0.1  # rounding error per norm of the merged task vector
SHOWN = 0.2  # the density of which sentences and tables speak
_SUBSTANTIAL = 0.01  # of all parameters: groups that are worth a sentence
_ENTRIES = 100  # of which a share is worth a sentence
_NAMES = 4

Row = Mapping[str, Any]


def find_flags(row: Row) -> list[str]:
    """What is wrong with the merge of a group of tensors, as codes, some with the parents after a colon.

    nonfinite: NaN or infinity. parent_is_base, same_parents, unrelated: of parents. exploded, merged_is_base,
    merged_is_parent: of the merge's task vector. rounded_away: the output's dtype does not hold it.
    """
    parents, merged = row["parents"], row["merged"]
    sizes = {name: numbers["task_vector"] or 0.0 for name, numbers in parents.items()}
    found = ["nonfinite"] if any(row["nonfinite"].values()) else []
    if not any(sizes.values()):
        return found
    found += [f"parent_is_base:{name}" for name, size in sizes.items() if not size]
    same = [p["parents"] for p in row["pairs"] if p["distance"] <= SAME * max(sizes[name] for name in p["parents"])]
    found += [f"same_parents:{','.join(pair)}" for pair in same]
    found += [f"unrelated:{name}" for name, numbers in parents.items() if (numbers["cosine_to_base"] or 1) < UNRELATED]
    if merged["to_largest_parent"] > EXPLODED:
        found.append("exploded")
    if merged["to_largest_parent"] < NEAR:
        found.append("merged_is_base")
    doubles = {name for pair in same for name in pair}
    near = [n for n, numbers in parents.items() if numbers["distance_to_merged"] < NEAR * sizes[n]]
    found += [f"merged_is_parent:{name}" for name in near if name not in doubles]
    if (merged["rounding_loss"] or 0) > LOSSY:
        found.append("rounded_away")
    return found


def say_flags(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Sentences for the flags of the model, and for those that only some blocks or kinds have: code, message, where."""
    model = data["model"]
    said = [{"code": code, "message": _MESSAGES[code.partition(":")[0]](code, model, data)} for code in model["flags"]]
    known = {code.partition(":")[0] for code in model["flags"]}
    for groups in ("blocks", "kinds"):
        codes = dict.fromkeys(code for row in data[groups] for code in row["flags"])
        for code in (c for c in codes if c.partition(":")[0] in _LOCAL and c.partition(":")[0] not in known):
            where = [row["name"] for row in data[groups] if code in row["flags"]]
            message = f"{_LOCAL[code.partition(':')[0]](code, data)} in {len(where)} of {len(data[groups])} {groups}: "
            said.append({"code": code, "message": message + _few(where), "where": where})
    return said


def say_findings(data: Mapping[str, Any]) -> list[str]:
    """What a reader should know first, in sentences."""
    return [*_sizes(data), *_directions(data), *_signs(data), *_merged(data), *_places(data), *_rounding(data)]


# ---- flags


def _subject(code: str) -> str:
    return code.partition(":")[2].replace(",", " and ")


def _say_nonfinite(code: str, model: Row, data: Mapping[str, Any]) -> str:
    whose = {**{name: name for name in data["parents"]}, "base": "the base", "merged": "the merge"}
    counts = ", ".join(
        f"{model['nonfinite'][who]:,} in {name}" for who, name in whose.items() if model["nonfinite"][who]
    )
    beyond = model["nonfinite"]["rounded"]
    told = [f"NaN or infinity: {counts}"] if counts else []
    told += [f"merged values beyond {' or '.join(data['dtypes'])}: {beyond:,}"] if beyond else []
    where = _few([row["name"] for row in data["tensors"] if "nonfinite" in row["flags"]])
    return f"{'; '.join(told)} (of {where}); these entries are left out of all numbers here"


def _say_exploded(code: str, model: Row, data: Mapping[str, Any]) -> str:
    times = model["merged"]["to_largest_parent"]
    return f"the merge has exploded: its task vector is {times:.3g} times the largest parent's. Lower the weights"


def _say_base(code: str, model: Row, data: Mapping[str, Any]) -> str:
    share = percent(model["merged"]["to_largest_parent"])
    return (
        f"the merge is almost the base {short_name(data['base'])}: its task vector is {share} of the largest parent's"
    )


def _say_parent(code: str, model: Row, data: Mapping[str, Any]) -> str:
    numbers = model["parents"][code.partition(":")[2]]
    share = percent(numbers["distance_to_merged"] / numbers["task_vector"])
    return f"the merge is almost {_subject(code)}: it lies {share} of that model's task vector away from it"


def _say_unrelated(code: str, model: Row, data: Mapping[str, Any]) -> str:
    cosine = model["parents"][code.partition(":")[2]]["cosine_to_base"]
    return f"{_subject(code)} hardly comes from {short_name(data['base'])}: the cosine of their weights is {cosine:.3f}"


def _say_rounded(code: str, model: Row, data: Mapping[str, Any]) -> str:
    loss, dtypes = percent(model["merged"]["rounding_loss"]), " or ".join(data["dtypes"])
    return f"rounding to {dtypes} adds an error of {loss} of the merged task vector: set `dtype: float32` to keep it"


_MESSAGES: dict[str, Callable[[str, Row, Mapping[str, Any]], str]] = {
    "nonfinite": _say_nonfinite,
    "exploded": _say_exploded,
    "merged_is_base": _say_base,
    "merged_is_parent": _say_parent,
    "unrelated": _say_unrelated,
    "rounded_away": _say_rounded,
    "parent_is_base": lambda code, model, data: (
        f"{_subject(code)} has the weights of the base {short_name(data['base'])}"
    ),
    "same_parents": lambda code, model, data: f"{_subject(code)} are almost the same model",
}
_LOCAL: dict[str, Callable[[str, Mapping[str, Any]], str]] = {
    "exploded": lambda code, data: f"the task vector is more than {EXPLODED:g} times the largest parent's",
    "merged_is_base": lambda code, data: f"the merge is almost the base {short_name(data['base'])}",
    "merged_is_parent": lambda code, data: f"the merge is almost {_subject(code)}",
    "same_parents": lambda code, data: f"{_subject(code)} are almost the same",
    "rounded_away": lambda code, data: f"rounding adds an error above {percent(LOSSY)} of the merged task vector",
}


# ---- findings


def _sizes(data: Mapping[str, Any]) -> Iterator[str]:
    sizes = {name: numbers["task_vector"] for name, numbers in data["model"]["parents"].items()}
    known = [size for size in sizes.values() if size]
    if not known:
        yield "no model differs from the base"
        return
    moved = _listed([f"{name} by {percent(size)}" for name, size in sizes.items()])
    largest = max(known)
    usual = "; ordinary finetunes of language models move by 1% or less" if largest > FAR else ""
    yield f"sizes: training moved {moved} of the base's norm{usual}"


def _directions(data: Mapping[str, Any]) -> Iterator[str]:
    pairs = [pair for pair in data["model"]["pairs"] if pair["cosine"] is not None]
    if not pairs:
        return
    low, high = (pick(pairs, key=lambda pair: pair["cosine"]) for pick in (min, max))
    if len(pairs) == 1:
        who = f"{' and '.join(low['parents'])} {_angle(low['cosine'])}"
        yield f"directions: {who}; the cosine of their task vectors is {signed(low['cosine'])}"
        return
    ends = [f"{signed(pair['cosine'])} ({' and '.join(pair['parents'])})" for pair in (low, high)]
    words = list(dict.fromkeys(_angle(pair["cosine"]) for pair in (low, high)))
    yield f"directions: the cosines of task vectors reach from {ends[0]} to {ends[1]}: they {' to '.join(words)}"


def _angle(cosine: float) -> str:
    if cosine < -0.1:
        return "work against each other"
    return "hardly overlap" if cosine < 0.1 else "overlap in part" if cosine < 0.5 else "largely agree"


def _signs(data: Mapping[str, Any]) -> Iterator[str]:
    found = min(data["model"]["signs"], key=lambda s: abs(s["density"] - SHOWN), default=None)
    if found is None or found["conflict"] is None:
        return
    density, chance = percent(found["density"]), percent(found["chance"])
    yield (
        f"signs: {percent(found['contested'])} of the entries are among the {density} largest of at least two task "
        f"vectors; in {percent(found['conflict'])} of those the signs are opposed (by chance: {chance})"
    )


def _merged(data: Mapping[str, Any]) -> Iterator[str]:
    merged, parents = data["model"]["merged"], data["model"]["parents"]
    if merged["explained"] is None or not merged["to_largest_parent"]:
        return
    mix = " + ".join(f"{n['coefficient']:.2f} {name}" for name, n in parents.items() if n["coefficient"] is not None)
    share = percent(merged["explained"])
    yield (
        f"merge: its task vector is {merged['to_largest_parent']:.2f} times as long as the longest parent's; "
        f"{mix} explains {share} of it".replace("+ -", "− ")
    )


def _places(data: Mapping[str, Any]) -> Iterator[str]:
    """Where signs differ most and where the merge is least a combination of its parents, if that varies."""
    for groups in ("blocks", "kinds"):
        rows = [row for row in data[groups] if row["parameters"] >= _SUBSTANTIAL * data["model"]["parameters"]]
        yield from _spread(groups, "signs are opposed most in", [(row["name"], _opposed(row)) for row in rows])
        explained = [(row["name"], row["merged"]["explained"]) for row in rows]
        yield from _spread(groups, "the mix of parents explains the merge best in", explained)


def _spread(groups: str, what: str, values: list[tuple[str, float | None]]) -> Iterator[str]:
    known = sorted((value, name) for name, value in values if value is not None)
    if known and known[-1][0] - known[0][0] > 0.1:
        (low, least), (high, most) = known[0], known[-1]
        yield f"{groups}: {what} {most} ({percent(high)}), least in {least} ({percent(low)})"


def _opposed(row: Row) -> float | None:
    """The share of opposed signs, if it is one of many entries."""
    found = min(row["signs"], key=lambda signs: abs(signs["density"] - SHOWN), default=None)
    return found["conflict"] if found and found["contested"] * row["parameters"] >= _ENTRIES else None


def _rounding(data: Mapping[str, Any]) -> Iterator[str]:
    loss = data["model"]["merged"]["rounding_loss"]
    if loss is not None and 0.005 < loss <= LOSSY:
        yield f"rounding: {' or '.join(data['dtypes'])} adds an error of {percent(loss)} of the merged task vector"


# ---- numbers


def percent(share: float | None) -> str:
    """`21%`, `2.1%`, `0.21%`, `<0.01%`."""
    if share is None:
        return "–"
    if 0 < share < 0.00005:
        return "<0.01%"
    digits = 0 if share >= 0.0995 or share == 0 else 1 if share >= 0.00995 else 2
    return f"{100 * share:.{digits}f}%"


def signed(cosine: float | None) -> str:
    """`+.19`, `−.02`."""
    if cosine is None:
        return "–"
    text = f"{abs(cosine):.2f}"
    return ("−" if cosine < 0 and float(text) else "+") + text.removeprefix("0")


def short_name(model: str) -> str:
    """The last part of a folder or a Hub name."""
    return model.rstrip("/").rpartition("/")[2] or model


def _listed(items: list[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else items[0]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more
