"""Train the quickstart models: a base, two full finetunes of it, and one of these finetunes again as a LoRA adapter.

    python recipes/quickstart/train.py [--output DIR] [--only base|cycle|shift|cycle-lora ...] [--seed N]

Everything takes about 13 minutes on one core of a busy server CPU: base 8, each expert 2, adapter 1. The same seed
and library versions on the same machine give the same weights.

Experts are trained to be merged. A merge uses a task vector (expert - base) at some scale other than 1, so every
step draws a scale, takes the gradient at base + scale * vector, and updates the vector; weight decay pulls the vector
to zero. Part of each batch replays the base's own mixture, so that the vector changes nothing but its own task.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tasks import TASKS, Example, base_example, expert_example
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, _ = range(len(SPECIAL))
VOCABULARY = {token: index for index, token in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz :->"])}
# The letters of words are random, so the loss on the prompt is mostly irreducible: it counts, but little.
PROMPT_WEIGHT = 0.1
LORA_TASK = "cycle"
STAGES = ("base", *TASKS, f"{LORA_TASK}-lora")


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train; `scales` bounds the task vector's scale that each step draws."""

    steps: int
    rate: float
    decay: float
    scales: tuple[float, float] = (1.0, 1.0)
    batch: int = 64
    replay: float = 0.6


BASE_PLAN = Plan(steps=1600, rate=2e-3, decay=0.01)
EXPERT_PLANS = {
    "cycle": Plan(steps=500, rate=1e-3, decay=2.0, scales=(0.4, 1.1)),
    "shift": Plan(steps=500, rate=1e-3, decay=2.0, scales=(0.4, 1.1)),
}
LORA_PLAN = Plan(steps=300, rate=3e-3, decay=0.0)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make the character-level tokenizer, which puts <bos> first and pads on the left."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
        **dict(zip(names, SPECIAL, strict=True)),
    )


def make_model() -> LlamaForCausalLM:
    """Make the untrained model: 6 Llama blocks of width 96 with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def encode(batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode examples as token ids, padded on the right, and the loss weight of each token (0 on padding)."""
    texts = [[BOS, *(VOCABULARY[c] for c in item.prompt + item.answer), EOS] for item in batch]
    width = max(map(len, texts))
    ids = torch.full((len(batch), width), PAD)
    weights = torch.zeros(len(batch), width)
    for row, (item, text) in enumerate(zip(batch, texts, strict=True)):
        ids[row, : len(text)] = torch.tensor(text)
        weights[row, : len(text)] = 1.0
        weights[row, : len(item.prompt) + 1] = PROMPT_WEIGHT
    return ids, weights


def loss_on(model: torch.nn.Module, batch: list[Example]) -> torch.Tensor:
    """Return the weighted mean next-token cross-entropy on the whole texts, in nats per token."""
    ids, weights = encode(batch)
    # Padding is on the right here, so under causal attention it needs no mask.
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def rate_factor(step: int, steps: int) -> float:
    """Return the learning rate's factor at `step`: a linear warmup over 5 % of the steps, then a cosine to zero."""
    return min((step + 1) / (0.05 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))


def fit(model: torch.nn.Module, draw: Callable[[random.Random], Example], plan: Plan, seed: int, name: str) -> None:
    """Train the trainable parameters of `model` in place on examples from `draw`, by AdamW on their change."""
    rng = random.Random(f"{seed}/{name}")
    weights = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in weights]
    # From scratch, weight decay pulls to zero; else to the start, for the optimizer sees the change only.
    vector = [torch.zeros_like(p) for p in weights]
    optimizer = torch.optim.AdamW(vector, lr=plan.rate, weight_decay=plan.decay, betas=(0.9, 0.98))
    model.train()
    began = time.monotonic()
    for step in range(plan.steps):
        scale = rng.uniform(*plan.scales)
        place(weights, start, vector, scale)
        loss = loss_on(model, [draw(rng) for _ in range(plan.batch)])
        gradients = torch.autograd.grad(loss, weights)
        for change, gradient in zip(vector, gradients, strict=True):
            change.grad = scale * gradient
        torch.nn.utils.clip_grad_norm_(vector, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * rate_factor(step, plan.steps)
        optimizer.step()
        if (step + 1) % 100 == 0:
            elapsed = time.monotonic() - began
            print(f"{name}: step {step + 1}/{plan.steps}, loss {loss.item():.4f}, {elapsed:.0f} s", flush=True)
    place(weights, start, vector, 1.0)
    model.eval()


@torch.no_grad()
def place(weights: list[torch.Tensor], start: list[torch.Tensor], vector: list[torch.Tensor], scale: float) -> None:
    """Set the weights to start + scale * vector."""
    for weight, origin, change in zip(weights, start, vector, strict=True):
        weight.copy_(origin + scale * change)


def save(model: torch.nn.Module, folder: Path) -> None:
    """Save `model` and, next to a full checkpoint, the tokenizer; readable by all, and naming no path."""
    if isinstance(model, LlamaForCausalLM):
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        settings = folder / "tokenizer_config.json"
        # The class name that transformers 4 knows too; transformers 5 reads both.
        content = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings.write_text(json.dumps(content, indent=2) + "\n")
    else:
        model.peft_config["default"].base_model_name_or_path = "base"
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
    for path in folder.iterdir():
        path.chmod(0o644)


def train(stage: str, output: Path, seed: int) -> None:
    """Train one of `STAGES` and save it in its folder under `output`; all but the base start from output/base."""
    torch.manual_seed(seed)
    if stage == "base":
        model = make_model()
        fit(model, base_example, BASE_PLAN, seed, stage)
        return save(model, output / stage)
    model = LlamaForCausalLM.from_pretrained(output / "base", dtype=torch.float32)
    plan = EXPERT_PLANS.get(stage, LORA_PLAN)
    if stage not in TASKS:
        adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapter)
    task = TASKS[stage.removesuffix("-lora")]
    fit(model, partial(expert_example, task, plan.replay), plan, seed, stage)
    save(model, output / stage)


def main() -> None:
    """Train the stages named by --only, or all of them, in order."""
    parser = argparse.ArgumentParser(description="Train the quickstart models.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="default: this script's folder")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; another number may change the weights")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    for stage in STAGES:
        if stage in arguments.only:
            train(stage, arguments.output, arguments.seed)


if __name__ == "__main__":
    main()
