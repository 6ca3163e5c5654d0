"""Router weights made of prompts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.deferred import Tensor, torch
from ctl_merge.dispatch import Placement
from ctl_merge.errors import CheckpointError, DataError
from ctl_merge.mixture import Expert, GateMode
from ctl_merge.model import load_weights, return_freed_memory
from ctl_merge.stacks import find_blocks

logger = logging.getLogger("ctl_merge")

_TOKENS = 2048  # of a batch, padding included: the base's weights are read once for each batch
_DEGENERATE = 5.0  # condition number of a layer's router from which on its rows hardly differ


class PromptGates:
    """One row per layer and expert, computed on first use: the base's mean state for the expert's prompts.

    The mean over positive prompts minus the mean over negative ones, at length 1. The state is that of the last token
    at the input of the layer (`hidden`), the mean over all tokens there (`hidden_avg`), or the sum of all tokens'
    embeddings, the same for every layer, positive and negative sums each at length 1 first (`cheap_embed`).
    Computed in float32 from weights that are read block by block, sums in float64.
    """

    def __init__(
        self, base: FileCheckpoint, embedding: str, layers: int, experts: Sequence[Expert], mode: GateMode
    ) -> None:
        self.base, self.embedding, self.layers, self.experts, self.mode = base, embedding, layers, experts, mode
        self._lock = threading.Lock()
        self._rows: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """(layers, experts, width) float64."""
        with self._lock, _one_thread():
            if self._rows is None:
                logger.info(f"computing gates: {self.base.name} reads the prompts of {len(self.experts)} experts")
                self._rows = self._compute()
                self._warn(self._rows)
            return self._rows

    @property
    def held_bytes(self) -> int:
        """Memory that computing them takes: a block's weights, and the states of a batch."""
        if self.mode == "cheap_embed":
            return 0
        layers: dict[str, int] = {}
        widest = self.base.tensors[self.embedding].shape[1]
        for name, spec in self.base.tensors.items():
            if "layers." in name:
                layer = name.partition("layers.")[2].partition(".")[0]
                layers[layer] = layers.get(layer, 0) + spec.numel
                widest = max(widest, *spec.shape)
        return 4 * (2 * max(layers.values(), default=0) + 8 * _TOKENS * widest)

    def _compute(self) -> Tensor:
        prompts = list(dict.fromkeys(p for expert in self.experts for p in (*expert.positive, *expert.negative)))
        tokens = self._tokens(prompts)
        if self.mode == "cheap_embed":
            states = {p: vectors.sum(0).expand(self.layers, -1) for p, vectors in self._embedded(tokens).items()}
        else:
            states = self._states(tokens)
        return torch.stack([self._row(expert, states) for expert in self.experts], dim=1)

    def _row(self, expert: Expert, states: dict[str, Tensor]) -> Tensor:
        """(layers, width)."""
        means = [torch.stack([states[p] for p in side]).mean(0) for side in (expert.positive, expert.negative) if side]
        if self.mode == "cheap_embed":
            means = [_unit(mean) for mean in means]
        return _unit(means[0] - means[1] if len(means) > 1 else means[0])

    def _tokens(self, prompts: Sequence[str]) -> dict[str, list[int]]:
        tokenizer = load_tokenizer(self.base)
        rows = self.base.tensors[self.embedding].shape[0]
        found = {}
        for prompt in prompts:
            ids = tokenizer((tokenizer.bos_token or "") + prompt, add_special_tokens=False)["input_ids"]
            if not ids or max(ids) >= rows:
                what = "has no tokens" if not ids else f"has a token beyond the embedding's {rows} rows"
                raise DataError(f"the prompt {prompt!r} {what} in {self.base.name}: write another one")
            found[prompt] = ids
        return found

    def _embedded(self, tokens: dict[str, list[int]]) -> dict[str, Tensor]:
        """Each prompt's embeddings: (tokens, width) float64."""
        table = self._embedding_rows(sorted({i for ids in tokens.values() for i in ids}))
        return {prompt: torch.stack([table[i] for i in ids]) for prompt, ids in tokens.items()}

    def _embedding_rows(self, ids: Sequence[int]) -> dict[int, Tensor]:
        """Single rows, read without the rest of the table where the checkpoint can."""
        spec, step = self.base.tensors[self.embedding], self.base.block(self.embedding)
        width, found = spec.shape[1], {}
        begin, end, piece = 0, 0, torch.empty(0, dtype=torch.float64)
        for i in ids:
            if (i + 1) * width > end:
                begin = i * width // step * step  # partial reads begin at multiples of a block
                end = min(-(-(i + 1) * width // step) * step, spec.numel)
                piece = torch.empty(end - begin, dtype=torch.float64)
                self.base.read_into(self.embedding, piece, begin)
            found[i] = piece[i * width - begin : (i + 1) * width - begin].clone()
        return found

    def _states(self, tokens: dict[str, list[int]]) -> dict[str, Tensor]:
        """Each prompt's state at the input of each layer: (layers, width) float64."""
        embedded = self._embedded(tokens)
        model = load_weights(self.base, Placement("cpu", {"": "disk"}))
        blocks = [block for stack in find_blocks(model).values() for block in stack.values()]
        found: dict[str, Tensor] = {}
        for batch in _batches(tokens):
            inputs, mask = _padded([embedded.pop(prompt).float() for prompt in batch])
            with torch.no_grad():
                states = _block_inputs(model, blocks, inputs, mask, average=self.mode == "hidden_avg")
            found |= {prompt: states[:, row] for row, prompt in enumerate(batch)}
        return_freed_memory()
        return found

    def _warn(self, rows: Tensor) -> None:
        alike = [i for i, layer in enumerate(rows) if not float(torch.linalg.cond(layer)) <= _DEGENERATE]
        if alike:
            listed = (
                "all layers"
                if len(alike) == len(rows)
                else f"layer{'s' * (len(alike) > 1)} {', '.join(map(str, alike))}"
            )
            logger.warning(
                f"gates of {listed} hardly tell the experts apart (condition number above {_DEGENERATE:g}): "
                "some experts will seldom be chosen; write prompts that differ more"
            )


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of sums, and with it the last bits, must not depend on how many threads there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _unit(vectors: Tensor) -> Tensor:
    """At length 1, each over the last dimension; zeros stay."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def _batches(tokens: dict[str, list[int]]) -> Iterator[list[str]]:
    """Prompts of similar length together, at most _TOKENS in a batch unless one has more."""
    batch: list[str] = []
    for prompt in sorted(tokens, key=lambda p: len(tokens[p])):
        if batch and (len(batch) + 1) * len(tokens[prompt]) > _TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _padded(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(batch, longest, width), padded on the right, which no token sees that comes before; the mask of real tokens."""
    inputs = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return inputs, (torch.arange(inputs.shape[1]) < lengths[:, None]).long()


def _block_inputs(model: Any, blocks: Sequence[Any], inputs: Tensor, mask: Tensor, average: bool) -> Tensor:
    """What goes into each block, at each sequence's last token or on average: (layers, batch, width) float64."""
    lengths = mask.sum(1)
    seen: list[Tensor] = []

    def see(module: Any, args: tuple[Tensor, ...]) -> None:
        return_freed_memory()  # of the block before
        rows = zip(args[0], lengths, strict=True)
        states = [row[:n].double().mean(0) if average else row[n - 1].double() for row, n in rows]
        seen.append(torch.stack(states))

    hooks = [block.register_forward_pre_hook(see) for block in blocks]
    try:
        model.base_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)


def load_tokenizer(base: FileCheckpoint) -> Any:
    """The tokenizer in the base's folder. Raises CheckpointError."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{base.name}: its tokenizer, which the prompts are read with, cannot be loaded ({reason})"
        ) from None
