"""Texts that models write after prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ctl_merge.deferred import Tensor, torch
from ctl_merge.errors import ProbeError
from ctl_merge.evaluating.batches import in_batches
from ctl_merge.evaluating.passages import opening
from ctl_merge.probing.forward import context
from ctl_merge.processes import ALONE, Ranks

_STEPS = 16  # tokens between two looks for a stop text


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, ends: Sequence[int] = (), stop: Sequence[str] = (),
    new_tokens: int = 128, batch: int = 8, samples: int = 1, temperature: float = 0.8, seed: int = 0,
    device: str = "cpu", templated: bool = False, told: Callable[[int], object] = lambda count: None,
    ranks: Ranks = ALONE,
) -> list[list[str]]:  # fmt: skip
    """What the model writes after each prompt, up to a token in `ends`, a text in `stop`, or `new_tokens`.

    One sample is greedy; several are drawn at `temperature`, by a generator seeded with `seed` for each batch. A prompt
    that leaves no room in the model's context loses its beginning. Prompts come after the special tokens with which the
    tokenizer begins a text, unless they are `templated` and have them. `ranks` share the batches. Raises
    ProbeError for a model that cannot write.
    """
    if model.config.is_encoder_decoder or not hasattr(model, "generate"):
        raise ProbeError(f"{type(model).__name__} does not continue a text: it has no answers to be compared")
    limit = context(model)
    room = max((limit or 1 << 30) - new_tokens, 1)
    first = [] if templated else opening(tokenizer)
    room = max(room - len(first), 1)
    ids = [[*first, *tokenizer(prompt, add_special_tokens=False)["input_ids"][-room:]] for prompt in prompts]
    ending = list(ends) or [e for e in [tokenizer.eos_token_id] if e is not None]
    sampling: dict[str, Any] = {"do_sample": samples > 1}
    if samples > 1:
        sampling |= {"temperature": temperature, "top_k": 0, "num_return_sequences": samples}

    def one_batch(rows: list[int]) -> list[list[str]]:
        pad = ending[0] if ending else 0
        tokens, mask = _padded([ids[i] for i in rows], pad)
        ended = [_Stopped(tokenizer, tokens.shape[1], stop)] if stop else []
        with torch.inference_mode(), torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=tokens.to(device), attention_mask=mask.to(device), max_new_tokens=new_tokens,
                pad_token_id=pad, eos_token_id=ending or None, stopping_criteria=ended, **sampling,
            )  # fmt: skip
        texts = [_cut(tokenizer, written, ending, stop) for written in output[:, tokens.shape[1] :].tolist()]
        told(len(rows) * ranks.count)
        return [texts[start : start + samples] for start in range(0, len(texts), samples)]

    return in_batches(list(map(len, ids)), batch, ranks, one_batch)


def _padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (B, T), padded on the left, so that what is written follows each prompt."""
    longest = max(1, *map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(own)) + list(own) for own in prompts])
    return ids, torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for own in prompts])


class _Stopped:
    """Whether a text that ends an answer stands in what was written."""

    def __init__(self, tokenizer: Any, prompt: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.prompt, self.stop = tokenizer, prompt, stop

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        written = ids.shape[1] - self.prompt
        done = [False] * len(ids)
        if written % _STEPS == 0:
            texts = self.tokenizer.batch_decode(ids[:, self.prompt :])
            done = [any(mark in text for mark in self.stop) for text in texts]
        return torch.tensor(done, device=ids.device)


def _cut(tokenizer: Any, tokens: list[int], ends: Sequence[int], stop: Sequence[str]) -> str:
    """The text of new tokens up to its end."""
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    text = tokenizer.decode(tokens[:at], skip_special_tokens=True)
    return text[: min([len(text), *(text.find(mark) for mark in stop if mark in text)])]
