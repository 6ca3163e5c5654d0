"""lm-evaluation-harness on a lazy or stored model."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctl_merge.errors import DataError
from ctl_merge.evaluating.evaluation import Evaluation
from ctl_merge.evaluating.options import EvaluationOptions
from ctl_merge.evaluating.subjects import open_groups
from ctl_merge.model import load_weights
from ctl_merge.probing.placement import place

_Z = 1.959963984540054


def check_harness() -> None:
    """Raises DataError, which says how to install it, where lm-evaluation-harness is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise DataError(
            "lm-evaluation-harness is not installed: pip install 'ctl-merge[harness]', or pip install lm-eval"
        )


def run_harness(
    models: Sequence[str | Path], tasks: Sequence[str], options: EvaluationOptions, *, folder: Path | None = None,
    limit: int | None = None, shots: int | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluate models on tasks of lm-evaluation-harness; a recipe's merge is not written.

    `folder`: with task files (YAML) of your own. `limit`: of each task's items. `shots`: examples before each item.
    Intervals follow from the harness' standard errors. Raises DataError for tasks that it does not know.
    """
    check_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise DataError(f"lm-evaluation-harness has no task {unknown[0]!r}: see `lm_eval ls tasks`")
    rows: list[dict[str, Any]] = []
    for group in open_groups(models, None, False, options.trust_remote_code):
        model = group.models[0]
        placement = place(
            model.checkpoint, options.device_map or "auto", options.max_memory, options.blocks,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
        running = load_weights(model.checkpoint, placement, blocks=options.blocks,
                               trust_remote_code=options.trust_remote_code)  # fmt: skip
        known = HFLM(pretrained=running, tokenizer=model.tokenizer, batch_size=options.batch)
        try:
            found = simple_evaluate(
                model=known, tasks=list(tasks), limit=limit, num_fewshot=shots, task_manager=manager, log_samples=False,
                confirm_run_unsafe_code=options.allow_code_execution,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, ImportError) as error:  # its data, its task files, what they need
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"lm-evaluation-harness cannot run {', '.join(tasks)}: {reason}") from error
        rows += [row for task, metrics in found["results"].items() for row in _rows(model.name, task, metrics, found)]
    return Evaluation(rows, {row["data"]: row["data"] for row in rows}, {"harness": _version(), "limit": limit})


def _rows(model: str, task: str, metrics: Mapping[str, Any], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, value in metrics.items():
        metric, comma, kept = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}_stderr,{kept}")
        half = _Z * error if isinstance(error, int | float) else float("nan")
        count = (found.get("n-samples") or {}).get(task, {}).get("effective", 0)
        label = metric if kept == "none" else f"{metric}, {kept}"
        rows.append({"model": model, "data": task, "metric": f"harness {label}", "count": count, "value": float(value),
                     "low": value - half, "high": value + half, "difference": None, "difference_low": None,
                     "difference_high": None})  # fmt: skip
    return rows


def _version() -> str:
    from importlib.metadata import version

    return version("lm-eval")
