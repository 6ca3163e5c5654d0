"""Search over a recipe's parameters with Optuna, on lazy merges."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ctl_merge.errors import DataError, OutputError
from ctl_merge.tuning.adjustable import Texts
from ctl_merge.tuning.rivals import Rival, Trier
from ctl_merge.tuning.written import Writer

METHODS = ("task_arithmetic", "ties", "dare_ties", "breadcrumbs")


def check_search(study: Path | None) -> None:
    """Raises DataError, which says how to install it, where Optuna is missing; OutputError for a study's folder."""
    if importlib.util.find_spec("optuna") is None:
        raise DataError("--trials needs Optuna: pip install 'ctl-merge[tune]', or pip install optuna")
    if study is not None and not study.absolute().parent.is_dir():
        raise OutputError(f"--study {study}: there is no folder {study.absolute().parent}")


def search(
    writer: Writer, trier: Trier, texts: Texts, trials: int, study: Path | None, said: str, seed: int,
    told: Callable[[int], object] = lambda count: None,
) -> Rival:  # fmt: skip
    """The best recipe of `trials` by its loss on the texts: method, λ, density, each parent's weight at either end.

    With a `study` file earlier trials count and later ones are added, also by several processes at once; `said`, what
    the texts are, keeps trials on other texts or models apart.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    title = hashlib.sha256(json.dumps([writer.method("x", {}), said]).encode()).hexdigest()[:16]
    storage = JournalStorage(JournalFileBackend(str(study))) if study else None
    kept = optuna.create_study(
        storage=storage, study_name=title, load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=None if study else seed, multivariate=True),
    )  # fmt: skip

    def objective(trial: Any) -> float:
        told(1)
        return trier.loss(_recipe(writer, trial), texts)

    done = optuna.trial.TrialState.COMPLETE
    if sum(trial.state == done for trial in kept.trials) < trials:
        if not kept.trials:  # plain task arithmetic, so that the search starts where everyone does
            plain = {f"{end}_{i}": 1.0 for i in range(len(writer.parents)) for end in ("first", "last")}
            kept.enqueue_trial({"method": "task_arithmetic", "lambda": 0.5, **plain})
        kept.optimize(objective, callbacks=[optuna.study.MaxTrialsCallback(trials, (done,))])
    best = kept.best_trial
    chosen = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in best.params.items())
    return Rival("search", _recipe(writer, best), f"trial {best.number} of {len(kept.trials)}: {chosen}")


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
