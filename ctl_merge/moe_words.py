"""What a mixture of experts is made of, in words."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from ctl_merge.bounded import MOST_CONFIG, parse_bounded, read_bounded
from ctl_merge.checkpoint import FileCheckpoint
from ctl_merge.correspondence import few
from ctl_merge.mixture import Mixture
from ctl_merge.moe_families import Family
from ctl_merge.reference import ModelRef

NETWORK = ".mlp."  # in the names of a dense model's feed-forward tensors

Checkpoints = Mapping[ModelRef, FileCheckpoint]


def structure(mixture: Mixture, family: Family, base: ModelRef) -> Iterator[str]:
    count = f"{len(mixture.experts)} experts, {mixture.experts_per_token} for each token"
    shared = f", and {mixture.shared[0].ref} for every token" if mixture.shared else ""
    yield f"a {family.name} ({family.model_class}): {count}{shared}; all else is {base}'s"
    for number, expert in enumerate(mixture.everyone):
        changed = [f"noise of standard deviation {expert.noise_scale:g}"] if expert.noise_scale else []
        if expert.residual_scale != 1.0:
            changed.append(f"output times {expert.residual_scale:g}")
        what = "shared expert" if number >= len(mixture.experts) else f"expert {number}"
        if changed:
            yield f"{what} ({expert.ref}): {', '.join(changed)}"
    yield f"gates: {gates(mixture, base)}"


def gates(mixture: Mixture, base: ModelRef) -> str:
    """Of what the router's weights are made."""
    return _GATES[mixture.gate_mode].format(base=base, count=_prompts(mixture))


_GATES = {
    "hidden": "states of {base} at the last token of {count} prompts, at the input of each layer",
    "hidden_last": "states of {base} at the last token of {count} prompts, at the input of each layer",
    "hidden_avg": "states of {base}, averaged over the tokens of {count} prompts, at the input of each layer",
    "cheap_embed": "{base}'s embeddings of the tokens of {count} prompts, the same for every layer",
    "random": "standard normal random numbers by the recipe's seed, to be trained",
    "uniform_random": "uniform random numbers by the recipe's seed, as a linear layer begins, to be trained",
}


def _prompts(mixture: Mixture) -> int:
    return sum(len(expert.positive) + len(expert.negative) for expert in mixture.everyone)


def unused(mixture: Mixture, base: ModelRef, checkpoints: Checkpoints) -> Iterator[str]:
    """What of the experts does not go into the output."""
    for ref in dict.fromkeys(expert.ref for expert in mixture.everyone):
        left = [name for name in checkpoints[ref].tensors if NETWORK not in name]
        if ref != base and left:
            yield f"of {ref}, {len(left)} tensors are not used (attention, norms, embeddings): {few(left, 2)}"
    if base not in {expert.ref for expert in mixture.everyone}:
        left = [name for name in checkpoints[base].tensors if NETWORK in name]
        yield f"of {base}, {len(left)} feed-forward tensors are not used: it is no expert"


def hints(mixture: Mixture, base: FileCheckpoint) -> Iterator[str]:
    count = len(mixture.experts)
    if count & (count - 1):
        yield f"{count} experts, not a power of two: llama.cpp does not run such a model"
    if mixture.from_prompts:
        yield from _doubled(mixture, base)


def _doubled(mixture: Mixture, base: FileCheckpoint) -> Iterator[str]:
    """Prompts that begin with what is put before every prompt."""
    try:
        token = parse_bounded(read_bounded(base.folder / "tokenizer_config.json", MOST_CONFIG)).get("bos_token")
    except (OSError, ValueError, AttributeError):
        return  # a tokenizer that cannot be read is refused when the prompts are
    token = token.get("content") if isinstance(token, dict) else token
    prompts = [p for expert in mixture.everyone for p in (*expert.positive, *expert.negative)]
    doubled = [p for p in prompts if token and p.startswith(token)]
    if doubled:
        yield f"{len(doubled)} prompts begin with {token!r}, which comes before every prompt anyway: they have it twice"


def left_out(base: ModelRef, names: Collection[str]) -> Iterator[str]:
    """Stored buffers that no class loads."""
    if names:
        yield f"{base}: {len(names)} stored buffers that the model computes are left out"
