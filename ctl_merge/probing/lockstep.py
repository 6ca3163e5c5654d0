"""Several models run through the same blocks in step.

Each model's own forward runs in a thread of its own; all meet before and after every block. Nothing of an
architecture is known here but its blocks, so every model that transformers runs can be probed, whatever its blocks are
called with.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ctl_merge.deferred import Tensor, torch

# Parts of a block whose outputs are looked at too, by the class names of its children.
_PARTS = {
    "attention": re.compile(r"Attention|Attn|Mixer|DeltaNet", re.IGNORECASE),
    "mlp": re.compile(r"MLP|FeedForward|FFN|Expert|MoE|LayerFF", re.IGNORECASE),
}


@dataclass
class Visit:
    """What one model brings to a meeting after a block: its output, and that of its ghost, by part (`block` too).

    The ghost is the block run once more, by a merged model, on the interpolation of the parents' inputs.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    ghost: dict[str, Tensor] = field(default_factory=dict)


# (site, {model: input of the block}) -> {merged model: interpolated input, to run the block on as well}
OnInputs = Callable[[str, Mapping[str, Tensor]], Mapping[str, Tensor]]
# (site, {model: visit}) -> {model: hidden states to go on with in place of its own}
OnOutputs = Callable[[str, Mapping[str, Visit]], Mapping[str, Tensor]]


class Lockstep:
    """Models whose blocks are instrumented to meet. `blocks`: for each model, its blocks by site, in order."""

    def __init__(
        self, blocks: Mapping[str, Mapping[str, torch.nn.Module]], on_inputs: OnInputs, on_outputs: OnOutputs
    ) -> None:
        self._names = list(blocks)
        self._on_inputs, self._on_outputs = on_inputs, on_outputs
        self._barrier = threading.Barrier(len(self._names), action=self._act)
        self._brought: dict[str, Any] = {}
        self._act_on: Callable[[dict[str, Any]], Any] = lambda brought: None
        self._result: Any = None
        self._originals: list[tuple[torch.nn.Module, str, Any]] = []
        for name, own in blocks.items():
            for site, block in own.items():
                self._instrument(name, site, block)

    def release(self) -> None:
        """Give every block its own forward back."""
        for block, attribute, forward in self._originals:
            if forward is None:  # the class's: a bound method kept on its own block would keep the block's weights
                delattr(block, attribute)
            else:
                setattr(block, attribute, forward)
        self._originals.clear()

    def run(self, forwards: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
        """Run every model's forward to its end; the first error of any of them ends all, and is raised."""
        self._barrier.reset()
        threads = torch.get_num_threads()  # shared out: the models run at the same time
        share = max(1, threads // len(forwards))
        try:
            with ThreadPoolExecutor(len(forwards), "probe", torch.set_num_threads, (share,)) as pool:
                futures = {name: pool.submit(self._guarded, forward) for name, forward in forwards.items()}
                errors = [future.exception() for future in futures.values()]
        finally:
            torch.set_num_threads(threads)
        for error in sorted(filter(None, errors), key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return {name: future.result() for name, future in futures.items()}

    def _guarded(self, forward: Callable[[], Tensor]) -> Tensor:
        try:
            with torch.inference_mode():
                return forward()
        except BaseException:
            self._barrier.abort()
            raise

    def _meet(self, name: str, value: Any, act: Callable[[dict[str, Any]], Any]) -> Any:
        """Wait for all models; one thread acts on what they brought, and all get its result."""
        self._brought[name], self._act_on = value, act
        self._barrier.wait()
        return self._result

    def _act(self) -> None:
        brought, self._brought = self._brought, {}
        with torch.inference_mode():
            self._result = self._act_on({name: brought[name] for name in self._names})

    def _instrument(self, name: str, site: str, block: torch.nn.Module) -> None:
        # Where weights are streamed, accelerate reads the block's before this and forgets them after.
        attribute = "_old_forward" if hasattr(block, "_hf_hook") else "forward"
        original = getattr(block, attribute)
        self._originals.append((block, attribute, vars(block).get(attribute)))
        parts = _parts(block)

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, replaced = _hidden(args, kwargs)
            ghost_input = self._meet(name, hidden, lambda all_: self._on_inputs(site, all_)).get(name)
            visit = Visit()
            with _recording(parts, visit.outputs):
                result = original(*args, **kwargs)
            visit.outputs["block"] = first(result)
            if ghost_input is not None:
                with _recording(parts, visit.ghost):
                    args, kwargs = replaced(ghost_input)
                    visit.ghost["block"] = first(original(*args, **kwargs))
            replacement = self._meet(name, visit, lambda all_: self._on_outputs(site, all_)).get(name)
            if replacement is None:
                return result
            return (replacement, *result[1:]) if isinstance(result, tuple) else replacement

        setattr(block, attribute, forward)


def first(output: Any) -> Tensor:
    """The hidden states of a block's output, which is a tensor or a tuple that begins with it."""
    return output[0] if isinstance(output, tuple | list) else output


def _hidden(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], tuple[tuple, dict[str, Any]]]]:
    """The block's input, and how to call it with another one in its place."""
    if args:
        return args[0], lambda other: ((other, *args[1:]), kwargs)
    return kwargs["hidden_states"], lambda other: (args, {**kwargs, "hidden_states": other})


def _parts(block: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The attention and the MLP among a block's children (or theirs, as in T5): the first whose class is so called."""
    children = [*block.children(), *(grand for child in block.children() for grand in child.children())]
    found: dict[str, torch.nn.Module] = {}
    for part, pattern in _PARTS.items():
        left = [child for child in children if child not in found.values()]  # a Qwen3MoeAttention is no mixture
        module = next((child for child in left if pattern.search(type(child).__name__)), None)
        if module is not None:
            found[part] = module
    return found


class _recording:
    """While entered, the outputs of the parts are kept, as copies: Falcon's block adds to them in place."""

    def __init__(self, parts: Mapping[str, torch.nn.Module], kept: dict[str, Tensor]) -> None:
        self.parts, self.kept = parts, kept

    def __enter__(self) -> None:
        def keep(part: str) -> Callable[..., None]:
            return lambda module, args, output: self.kept.__setitem__(part, first(output).clone())

        self.handles = [module.register_forward_hook(keep(part)) for part, module in self.parts.items()]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
