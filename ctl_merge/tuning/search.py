"""Search over a recipe's parameters with Optuna, on lazy merges."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ctl_merge.errors import NonFiniteError
from ctl_merge.processes import ALONE, Ranks
from ctl_merge.tuning.adjustable import Texts
from ctl_merge.tuning.rivals import Rival, Trier
from ctl_merge.tuning.study import opened, title_of
from ctl_merge.tuning.written import Writer

METHODS = ("task_arithmetic", "ties", "dare_ties", "breadcrumbs")


def search(
    writer: Writer, trier: Trier, texts: Texts, trials: int, study: Path | None, seed: int,
    told: Callable[[int], object] = lambda count: None, ranks: Ranks = ALONE,
) -> Rival:  # fmt: skip
    """The best recipe of `trials` by its loss on the texts: method, λ, density, each parent's weight at either end.

    With a `study` file earlier trials count and later ones are added, by all `ranks` and by whoever else uses the file;
    each begins a trial while fewer than `trials` are done, so that there are at most one more for each other process.
    A trial that did not end, since its process was killed, does not count. Of equal losses the earlier trial is better:
    all ranks return the same. One that fails ends alone, as a launcher then ends the others. Raises NonFiniteError
    where no trial has a loss.
    """
    from optuna.study import MaxTrialsCallback
    from optuna.trial import TrialState

    def objective(trial: Any) -> float:
        told(ranks.count)
        try:
            return trier.loss(_recipe(writer, trial), texts)
        except NonFiniteError:
            return math.inf  # done, and the worst: so many weights overflow

    with opened(study, title_of(writer.method("x", {}), texts), seed, ranks) as kept:
        ranks.at_first(lambda: _begin(kept, len(writer.parents)))
        if len(kept.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < trials:
            kept.optimize(objective, callbacks=[MaxTrialsCallback(trials, (TrialState.COMPLETE,))])
        ranks.gather(None)  # all have ended their trials
        done: Any = ranks.gather(kept.get_trials(states=(TrialState.COMPLETE,)) if ranks.first else None)[0]
    best = min(done, key=lambda trial: (trial.value, trial.number))
    if not math.isfinite(best.value):
        raise NonFiniteError(f"the loss of all {len(done)} trials is not a number: the models do not fit the data")
    chosen = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in best.params.items())
    asked = f" ({trials} were asked for)" if len(done) > trials else ""
    by = f" by {ranks.count} processes" if ranks.count > 1 else ""
    return Rival("search", _recipe(writer, best), f"trial {best.number} of {len(done)}{asked}{by}: {chosen}")


def _begin(study: Any, parents: int) -> None:
    """Plain task arithmetic first, so that the search starts where everyone does; again if it was killed meanwhile."""
    from optuna.trial import TrialState

    if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.WAITING)):
        return
    plain = {f"{end}_{i}": 1.0 for i in range(parents) for end in ("first", "last")}
    study.enqueue_trial({"method": "task_arithmetic", "lambda": 0.5, **plain})


def _recipe(writer: Writer, trial: Any) -> str:
    """The recipe of a trial, or of a finished one: weights are gradients from the first block to the last."""
    method = trial.suggest_categorical("method", METHODS)
    scale = round(trial.suggest_float("lambda", 0.1, 1.5), 4)
    density = {} if method == "task_arithmetic" else {"density": round(trial.suggest_float("density", 0.1, 1.0), 4)}
    own = [
        {"weight": [round(trial.suggest_float(f"{end}_{i}", 0.2, 1.8), 4) for end in ("first", "last")], **density}
        for i in range(len(writer.parents))
    ]
    return writer.text(method, own, {"lambda": scale})
