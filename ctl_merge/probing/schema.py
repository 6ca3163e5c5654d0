"""What probe.json holds: its keys, types and meaning.

`Report.model_json_schema()` is the JSON schema of `format` 2. Numbers are null where they do not exist: R where the
parents agree, a fit of nothing, the interval of one sequence. Formats with another number may mean other things.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Number = float | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Interval(_Strict):
    """A number with its 95 % interval: bootstrap over sequences, 1000 draws, the same for all numbers of a set."""

    value: Number
    low: Number
    high: Number


class AgainstParent(Interval):
    """A loss minus that of the parent."""

    parent: str


class BestParent(_Strict):
    """The parent of the lowest loss on a data set."""

    parent: str
    second: str | None
    margin: Interval | None = Field(description="loss of the second minus loss of the best")


class Merge(_Strict):
    """A merge that was probed."""

    name: str
    effective_weight: dict[str, Number] = Field(description="ĉ of each parent, over all tensors")
    explained_weight: Number = Field(description="R² of that fit: how far τ_m is a combination of the parents'")
    main: bool = Field(False, description="the merge with ghosts, patches, null and scaling")
    alpha: Number = Field(None, description="of a sweep")
    method: str | None = Field(None, description="of the recipe")
    recipe: str | None = Field(None, description="the recipe's file")


class Lineage(_Strict):
    """How far a parent is from the base, over all tensors."""

    parent: str
    relative_norm: Number = Field(description="‖τ‖ / ‖θ_0‖")
    cosine_to_base: Number = Field(description="cos(θ_i, θ_0)")
    cosine_to_others: Number = Field(description="the largest cos(τ_i, τ_j) with another parent")


class Row(_Strict):
    """One merge at one site. `x_low`, `x_high`: the 95 % interval of `x`."""

    block: str = Field(description="path of the site: a block, `….attention` or `….mlp` in it, `….input` of a stack")
    stack: str
    index: int | None
    part: Literal["block", "attention", "mlp", "input"]
    merge: str
    nonlinearity: Number = Field(description="R = sqrt(E‖F_m - I‖² / Σ |α_i| E‖F_i - I‖²)")
    nonlinearity_low: Number
    nonlinearity_high: Number
    nonlinearity_robust: Number = Field(description="R without the massive dimensions")
    nonlinearity_against_first: Number = Field(None, description="R minus that of the first merge, paired")
    nonlinearity_against_first_low: Number = None
    nonlinearity_against_first_high: Number = None
    nonlinearity_written: Number = Field(None, description="R of the merge rounded to its dtype")
    nonlinearity_written_low: Number = None
    nonlinearity_written_high: Number = None
    nonlinearity_null: Number = Field(None, description="R with a parent replaced by one of random signs")
    nonlinearity_null_low: Number = None
    nonlinearity_null_high: Number = None
    floor: Number = Field(None, description="size of the rounding alone, against the disagreement")
    floor_low: Number = None
    floor_high: Number = None
    cos: Number = Field(description="E cos(F_m, I), flattened over the tokens of a sequence")
    cos_low: Number
    cos_high: Number
    cos_token: Number = Field(description="the same for each token")
    coef: Number = Field(description="E <F_m, I> / ‖I‖²")
    coef_low: Number
    coef_high: Number
    cos_parents: Number = Field(description="E cos(F_i, F_j), mean over pairs")
    cos_to_parents: dict[str, Number]
    effective_feature: dict[str, Number] = Field(description="ĉ in feature space")
    effective_feature_low: dict[str, Number]
    effective_feature_high: dict[str, Number]
    explained_feature: Number = Field(description="its R²")
    explained_feature_low: Number
    explained_feature_high: Number
    effective_weight: dict[str, Number] = Field(description="c: ĉ in weight space, over the block's tensors")
    explained_weight: Number = Field(description="its R²")
    local: Number = Field(description="‖B_m(I) - I‖ against the disagreement: what the block creates")
    local_low: Number
    local_high: Number
    propagated: Number = Field(description="‖F_m - B_m(I)‖ against the disagreement: what it inherits")
    propagated_low: Number
    propagated_high: Number
    relative_deviation: Number = Field(description="‖F_m - I‖ / ‖I‖")
    by_stratum: dict[str, Number] = Field(description="R over the tokens of each stratum")
    massive: list[int] = Field(description="dimensions left out of nonlinearity_robust")
    slope_deviation: Number = Field(None, description="log-log slope of ‖F_m - I‖ when task vectors are scaled; 2")
    slope_deviation_low: Number = None
    slope_deviation_high: Number = None
    slope_cos: Number = Field(None, description="of 1 - cos; 4 in the quadratic regime")
    slope_cos_low: Number = None
    slope_cos_high: Number = None
    slope_nonlinearity: Number = Field(None, description="of R; 1 in the quadratic regime")
    slope_nonlinearity_low: Number = None
    slope_nonlinearity_high: Number = None
    quadratic: bool | None = Field(None, description="all slopes within an eighth; null: too small to tell")


class Cost(_Strict):
    """What a merge's loss is made of, nats per token."""

    ensemble: Interval = Field(description="loss of the parents' logits, mixed linearly")
    nonlinearity_cost: Interval = Field(description="loss of the merge minus that of the ensemble")
    dilution_cost: dict[str, Interval] = Field(description="loss of the ensemble minus that of each parent")
    against_first: Interval | None = Field(description="loss minus that of the first merge")
    against_base: Interval = Field(description="loss minus that of the base")
    against_best_parent: AgainstParent | None = Field(description="loss minus that of the best parent")
    kl: Interval = Field(description="KL(merged ‖ ensemble)")
    agreement: Interval = Field(description="how often the top tokens of merge and ensemble agree")
    patch: dict[str, Interval] = Field(description="loss recovered by I in place of F_m after a block: cumulative")
    blame: dict[str, Interval] = Field(
        description="each block's share, and that of `logits`; those of the last stack add up to nonlinearity_cost"
    )


class Losses(_Strict):
    """Losses on one data set, nats per token."""

    nll: dict[str, Interval] = Field(description="of base, parents and merges")
    merges: dict[str, Cost]


class DataSet(_Strict):
    """What was found on one data set."""

    sequences: int
    tokens: int
    strata: dict[str, int] = Field(description="tokens of each stratum that has any; a token is in one of them")
    skipped_rows: int = Field(description="rows left out, since they hold a null")
    best_parent: BestParent | None
    blocks: list[Row]
    losses: Losses | None = Field(description="null for models that predict no next token")


class Report(_Strict):
    """probe.json."""

    format: Literal[2]
    ctl_merge: str
    base: str
    parents: list[str]
    merges: list[Merge]
    settings: dict[str, Any]
    warnings: list[str]
    lineage: list[Lineage]
    tuning: dict[str, Any] | None = Field(None, description="of a merge before and after tuning: as `tune --json`")
    sets: dict[str, DataSet]
