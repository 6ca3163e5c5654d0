"""A method's inputs: models, base and the parameters they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ctl_merge.methods import Method, Parameter
from ctl_merge.problems import Place, Problems
from ctl_merge.recipe import Source
from ctl_merge.reference import ModelRef
from ctl_merge.settings import Setting

_BASE_PARAMETERS = "parameters of the base model have no effect: its own task vector is zero"


class InputChecker:
    """Puts sources in the order in which a method sees them; `problems` and `warnings` get what there is to say."""

    def __init__(self, problems: Problems, warnings: list[str]) -> None:
        self.problems, self.warnings = problems, warnings

    def whole(self, method: Method, sources: list[Source], base: ModelRef | None) -> list[Source]:
        """The inputs in the order in which the method sees them."""
        if base is None:
            return sources
        if method.base == "none":
            if all(source.ref != base for source in sources):
                self.problems.append((("base_model",), f"{method.name} takes no `base_model`: remove it"))
            return sources
        if method.space == "task_vectors":
            if any(source.ref == base and source.settings for source in sources):
                self.warnings.append(_BASE_PARAMETERS)
            return self._apart(method, sources, base)
        if all(source.ref != base for source in sources):
            sources = [*sources, Source(base)]
        return sorted(sources, key=lambda source: source.ref != base) if method.base == "required" else sources

    def of_slice(
        self, at: Place, method: Method, sources: list[Source], base: ModelRef | None
    ) -> tuple[list[Source], Source | None]:
        """A slice's sources as the method sees them, and the base's layers, which must be among those listed."""
        own = [source for source in sources if source.ref == base]
        if base is None or method.base == "none":
            return sources, None
        if method.base == "required" and len(own) != 1:
            what = "is not among its sources" if not own else "is among its sources more than once"
            self.problems.append(
                (at, f"the slice's base {base} {what}: {method.name} needs it once, with its layer_range")
            )
        if method.space == "task_vectors":
            if any(source.settings for source in own):
                self.warnings.append(_BASE_PARAMETERS)
            return self._apart(method, sources, base), own[0] if own else None
        if method.base == "required":
            sources = sorted(sources, key=lambda source: source.ref != base)
        return sources, None

    def _apart(self, method: Method, sources: list[Source], base: ModelRef) -> list[Source]:
        """The models whose task vectors count; the base's own, which is zero, where it is listed alone."""
        others = [source for source in sources if source.ref != base]
        if others or not sources:
            return others
        self.warnings.append(f"there is no model besides the base {base}: the output is the base")
        needed = [name for name, parameter in method.parameters.items() if parameter.required and parameter.per_model]
        without_effect = {name: Setting(((None, 1.0),)) for name in needed}
        return [replace(sources[0], settings={**without_effect, **sources[0].settings})]

    def complete(
        self, at: Place, method: Method, sources: list[Source], shared: Mapping[str, Setting], base: ModelRef | None
    ) -> None:
        """What is missing as a whole: the base, models, required parameters. `at`: where the models are listed."""
        if method.base == "required" and base is None:
            what = "that the others come from" if method.space == "task_vectors" else "of the two from which it starts"
            self.problems.append((("merge_method",), f"{method.name} needs a `base_model`: the model {what}"))
        least, most = method.models
        if len(sources) < least or (most is not None and len(sources) > most):
            wanted = f"{least}" if least == most else f"at least {least}"
            kind = "models besides the base" if method.space == "task_vectors" else "models, the base included"
            self.problems.append((at, f"{method.name} merges {wanted} {kind}; the recipe has {len(sources)}"))
        for parameter in method.parameters.values():
            self._require(at, parameter, sources, shared, base)

    def _require(
        self, at: Place, parameter: Parameter, sources: list[Source], shared: Mapping[str, Setting],
        base: ModelRef | None,
    ) -> None:  # fmt: skip
        if not parameter.required or parameter.name in shared:
            return
        if not parameter.per_model:
            self.problems.append((("parameters",), f"the parameter `{parameter.name}` is missing"))
            return
        for index, source in enumerate(sources):
            if parameter.name not in source.settings:
                note = " (the base is an ordinary input of this method)" if source.ref == base else ""
                self.problems.append(
                    ((*at, index), f"the model {source.ref} has no `{parameter.name}`{note}: give it one")
                )
