"""What it takes to plan a merge of the largest models, from headers alone.

    python benchmarks/plan_scale.py

Four finetunes of Llama 3.1 70B (723 tensors each) and of a mixture of experts with the shapes of DeepSeek V3 (671
billion parameters, 45,000 tensors each) are planned by `ctl-merge RECIPE --dry-run` in a process of its own. The models
are stand-ins: true names, shapes, files and configs, and holes for weights. The ceilings are 60 s of CPU time and 1 GB
of anonymous memory (as in measured.py; Linux only): the exit code is 1 if one is exceeded. Start-up is the time of
`ctl-merge --dry-run` of a tiny recipe. `--profile` prints where the time goes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measured import cost_of
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from stand_ins import (  # noqa: E402
    GB,
    LLAMA_3_1_70B,
    llama_tensors,
    write_llama_3_tokenizer,
    write_stand_in,
    write_tokenizer,
)

SECONDS, BYTES = 60.0, 10**9
MODELS = 4

DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "n_routed_experts": 256,
    "n_shared_experts": 1, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_attention_heads": 128,
    "num_key_value_heads": 128, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "vocab_size": 129280,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def deepseek_tensors(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A DeepSeek V3 in bf16, without its layer that predicts a second token."""
    hidden, heads, kv = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    low = config["q_lora_rank"]
    attention = {
        "q_a_proj.weight": (low, hidden), "q_a_layernorm.weight": (low,),
        "q_b_proj.weight": (heads * (nope + rope), low), "kv_a_proj_with_mqa.weight": (kv + rope, hidden),
        "kv_a_layernorm.weight": (kv,), "kv_b_proj.weight": (heads * (nope + value), kv),
        "o_proj.weight": (hidden, heads * value),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {f"{layer}.self_attn.{name}": shape for name, shape in attention.items()}
        if index < config["first_k_dense_replace"]:
            shapes |= _mlp(f"{layer}.mlp", hidden, config["intermediate_size"])
        else:
            inner, experts = config["moe_intermediate_size"], config["n_routed_experts"]
            shapes[f"{layer}.mlp.gate.weight"] = (experts, hidden)
            shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = (experts,)
            for expert in range(experts):
                shapes |= _mlp(f"{layer}.mlp.experts.{expert}", hidden, inner)
            shapes |= _mlp(f"{layer}.mlp.shared_experts", hidden, inner * config["n_shared_experts"])
        shapes |= {f"{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}
    return {name: ("F32" if name.endswith("bias") else "BF16", shape) for name, shape in shapes.items()}


def _mlp(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    wide = {f"{prefix}.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")}
    return {**wide, f"{prefix}.down_proj.weight": (hidden, inner)}


def write_llama(folder: Path) -> None:
    write_stand_in(folder, LLAMA_3_1_70B, llama_tensors(LLAMA_3_1_70B))
    write_llama_3_tokenizer(folder)


def write_deepseek(folder: Path) -> None:
    write_stand_in(folder, DEEPSEEK_V3, deepseek_tensors(DEEPSEEK_V3), 5 * GB)
    write_tokenizer(folder, 128000, {i: f"<special {i}>" for i in range(128000, 128815)})


FAMILIES: dict[str, Callable[[Path], None]] = {"Llama 3.1 70B": write_llama, "DeepSeek V3": write_deepseek}


def write_recipe(folder: Path, write: Callable[[Path], None]) -> Path:
    """A base and finetunes, and a recipe that merges them by the TIES of the paper."""
    names = ["base", *(f"expert-{i}" for i in range(1, MODELS + 1))]
    for name in names:
        write(folder / name)
    listed = [f"  - {{model: {folder / name}, parameters: {{weight: 1.0, density: 0.2}}}}" for name in names[1:]]
    recipe = folder / "recipe.yaml"
    header = ["merge_method: ties", f"base_model: {folder / 'base'}", "parameters: {trim: model}", "models:"]
    recipe.write_text("\n".join([*header, *listed, ""]))
    return recipe


def measure(recipe: Path) -> dict[str, Any]:
    """Wall and CPU seconds and peak anonymous memory of a dry run, and what it says."""
    plan = recipe.with_suffix(".json")
    code = (
        "import sys; from ctl_merge.cli import main; sys.stdout = open(sys.argv.pop(), 'w'); "
        "sys.argv[0] = 'ctl-merge'; main()"
    )
    before = os.times()
    cost = cost_of([sys.executable, "-c", code, str(recipe), "--dry-run", "--json", str(plan)])
    peak, wall = cost.anonymous, cost.wall
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    summary = json.loads(plan.read_text())
    return {
        "wall": round(wall, 2), "cpu": round(cpu, 2), "peak": peak, "write": summary["bytes"]["write"],
        "tensors": summary["tensors"]["merged"] + summary["tensors"]["copied"], "shards": len(summary["shards"]),
    }  # fmt: skip


def profile(recipe: Path) -> None:
    from ctl_merge.merging import Merge

    profiler = cProfile.Profile()
    start = time.perf_counter()
    profiler.runcall(lambda: Merge(recipe).summary())
    print(f"{time.perf_counter() - start:.1f} s under the profiler")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="print where the time of planning goes")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, write in FAMILIES.items():
            folder = Path(temporary, name.replace(" ", "-"))
            recipe = write_recipe(folder, write)
            if options.profile:
                profile(recipe)
            rows.append({"model": name, **measure(recipe)})
    table = Table(title=f"--dry-run of a base and {MODELS} finetunes")
    for column in ("model", "tensors", "shards", "output GB", "wall s", "CPU s", "peak MB"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for r in rows:
        cells = (f"{r['tensors']:,}", r["shards"], f"{r['write'] / 1e9:.0f}", r["wall"], r["cpu"])
        table.add_row(r["model"], *map(str, cells), f"{r['peak'] / 1e6:.0f}")
    Console().print(table)
    holds = all(r["cpu"] <= SECONDS and r["peak"] <= BYTES for r in rows)
    print(json.dumps({"benchmark": "plan_scale", "holds": holds, "rows": rows}))
    sys.exit(not holds)


if __name__ == "__main__":
    main()
