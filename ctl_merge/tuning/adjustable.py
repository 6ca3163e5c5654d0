"""A model of base plus coefficients times task vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ctl_merge.checkpoint import Checkpoint
from ctl_merge.deferred import Tensor, torch
from ctl_merge.devices import physical_memory
from ctl_merge.dispatch import Placement
from ctl_merge.errors import DeviceError
from ctl_merge.evaluating.likelihood import losses
from ctl_merge.evaluating.passages import Passage, padded
from ctl_merge.model import ModuleWeights, load_weights
from ctl_merge.probing.forward import forward
from ctl_merge.tuning.levels import groups

Array = np.ndarray
Texts = Mapping[str, Sequence[Passage]]


class Adjustable:
    """θ(c) = θ_0 + Σ c_i τ_i, with c (groups, parents) for the groups of tensors of a level.

    The model is held in float32 on the placement's device; task vectors are held beside it where they fit into a
    quarter of the memory, else read again whenever they are used.
    """

    def __init__(
        self, base: Checkpoint, parents: Mapping[str, Checkpoint], placement: Placement, batch: int = 8,
        blocks: str | None = None, trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        if not placement.whole:
            raise DeviceError(
                "tuning by gradients needs the model whole on one device: give --device-map cpu or cuda:0"
            )
        self.batch, self.device, self.config = batch, placement.device, base.config
        self.model = load_weights(base, placement, blocks=blocks, trust_remote_code=trust_remote_code)
        self.parents = list(parents)
        self.parameters = dict(self.model.named_parameters())
        weights = [ModuleWeights(self.model, checkpoint) for checkpoint in (base, *parents.values())]
        self.sources = {name: weights[0].sources(name) for name in self.parameters}
        size = sum(parameter.numel() for parameter in self.parameters.values())
        held = 4 * size * len(weights) <= physical_memory() // 4
        self._weights: list[Mapping[str, Tensor]] = [dict(own) if held else own for own in weights]

    def places(self, level: str) -> tuple[list[str], dict[str, int]]:
        """The groups of a level, and each parameter's place among them; that of its first tensor if it has several."""
        tensors = [tensor for own in self.sources.values() for tensor in own]
        of_tensor = groups(tensors, self.config, level)
        of_parameter = {name: of_tensor[own[0]] for name, own in self.sources.items()}
        listed = list(dict.fromkeys(of_parameter.values()))
        return listed, {name: listed.index(group) for name, group in of_parameter.items()}

    def tensors(self, coefficients: Array, place: Mapping[str, int]) -> dict[str, list[float]]:
        """The coefficients of each file tensor."""
        return {tensor: coefficients[place[n]].tolist() for n, own in self.sources.items() for tensor in own}

    def set(self, coefficients: Array, place: Mapping[str, int]) -> None:
        """Give the model the weights of these coefficients (groups, parents)."""
        for name, parameter in self.parameters.items():
            base = self._weights[0][name].to(self.device)
            mixed = base.clone()
            for own, c in zip(self._weights[1:], coefficients[place[name]], strict=True):
                mixed.add_(own[name].to(self.device) - base, alpha=float(c))
            parameter.data.copy_(mixed)

    def loss(self, texts: Texts) -> float:
        """Mean over the texts of the loss in nats per token."""
        found = [losses(self.model, own, self.batch, self.device) for own in texts.values()]
        return float(np.mean([sum(each.nll) / sum(each.tokens) for each in found]))

    def slope(self, texts: Texts, place: Mapping[str, int], count: int) -> tuple[float, Array]:
        """The loss and its gradient with respect to the coefficients (groups, parents).

        ∂L/∂c_i = <∂L/∂θ, τ_i>, summed over the tensors of a group: exact. A parameter's gradient is forgotten as soon
        as it has been used, so that no second model is held.
        """
        gradient = np.zeros((count, len(self.parents)))
        handles = [p.requires_grad_(True).register_post_accumulate_grad_hook(self._project(n, gradient[place[n]]))
                   for n, p in self.parameters.items()]  # fmt: skip
        total = 0.0
        try:
            for passages in texts.values():
                tokens = sum(int(p.counted.sum()) for p in passages) * len(texts)
                for start in range(0, len(passages), self.batch):
                    loss = self._nll(passages[start : start + self.batch]) / tokens
                    loss.backward()
                    total += float(loss.detach())
        finally:
            for handle in handles:
                handle.remove()
            for parameter in self.parameters.values():
                parameter.requires_grad_(False)
        return total, gradient

    def _nll(self, passages: Sequence[Passage]) -> Tensor:
        ids, counted = padded(passages)
        run, labels = forward(self.model, ids.to(self.device))
        assert labels is not None  # `losses` has refused such a model
        kept = counted[:, -labels.shape[1] :].to(self.device)[:, 1:]
        return torch.nn.functional.cross_entropy(run()[:, :-1][kept].float(), labels[:, 1:][kept], reduction="sum")

    def _project(self, name: str, gradient: Array) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            slope = parameter.grad.flatten().double()
            base = self._weights[0][name].to(self.device)
            for i, own in enumerate(self._weights[1:]):
                gradient[i] += float(slope @ (own[name].to(self.device) - base).flatten().double())
            parameter.grad = None

        return hook
