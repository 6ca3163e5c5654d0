"""Real mergekit files: each plans against stand-ins of its models, or is refused for the reason listed here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from found_models import write_found
from hub_server import HubServer, use_hub

from ctl_merge.errors import MismatchError, RecipeError
from ctl_merge.merging import Merge
from ctl_merge.recipe_file import load_recipe
from ctl_merge.reference import ModelRef

CONFIGS = Path(__file__).parent.parent.parent / "shared" / "mergekit_configs"

# What a person would refuse too, for what the file says. mergekit refuses those with a * too.
WRONG = {
    "017_slerp": r"`t` is missing\n.*slerp merges 2 models, the base included; the recipe has 3\n.*'t' is shared",  # *
    **dict.fromkeys(("032_slerp", "035_slerp", "040_slerp", "044_slerp"), "slerp needs a `base_model`"),  # *
    "038_dare_ties": "no parameter 'dare': remove it",
    "043_slerp": "'./merged_step1' is neither a folder that exists .*If another recipe makes it",  # *
    "050_sce": r"sce has no parameter 'normalize': remove it \(it has select_topk\)",
    "051_sce": r"'./Base_6_v2' is neither a folder.*\n.*'select_topk' is a parameter.*\n.*did you mean 'dtype'",
    "053_della_linear": "'./intermediates/First' is neither a folder .*If another recipe makes it",  # *
    "061_model_stock": "model_stock has no parameter 'weight': remove it",
    "063_dare_linear": "'/home/llm/mergequant/.*' is neither a folder",  # *
    "064_dare_linear": "'D:/Uni/.*' is neither a folder",  # *
    "068_passthrough": "a revision is written after the model's name",
}
EVOLVE = "mergekit-evolve genome is not a recipe"
# What a person would refuse for what the models are. Without a tokenizer key mergekit refuses other numbers of rows
# too, and other tokens at the same rows not.
APART = {
    "009_ties": "32000 rows in TheBloke/.*, 32001 in WizardLM/.*. Set `tokenizer_source: base`",
    "011_slerp": "32032 rows in NousResearch/Hermes-2-Pro-Mistral-7B, 32001 in",
    "015_ties": "32000 rows in NousResearch/Llama-2-7b-hf, 32003 in",
    "016_dare_ties": "32000 rows in mistralai/Mistral-7B-v0.1, 32002 in",
    "034_task_arithmetic": "Mixtral-8x7B-v0.1 is 'mixtral', WizardLM/WizardMath-7B-V1.1 is 'mistral'",
    "036_ties": "Mixtral-8x7B-v0.1 is 'mixtral', WizardLM/WizardMath-7B-V1.1 is 'mistral'",
    "039_task_arithmetic": "Mistral-7B-v0.1 is 'mistral', medalpaca/medalpaca-7b is 'llama'",
    "056_della": "6 ids stand for other tokens in deepseek-ai/DeepSeek-R1-Distill-Llama-8B than in",
    "058_breadcrumbs": "32000 rows in mlabonne/NeuralBeagle14-7B, 32002 in",
    "070_task_arithmetic": "32000 rows in NousResearch/Llama-2-7b-hf, 56064 in",
}
PLANNED = {
    "004_arcee_fusion", "005_ties", "006_slerp", "007_linear", "008_passthrough", "013_slerp", "014_ties",
    "029_model_stock", "031_slerp", "037_linear", "046_passthrough", "049_nearswap", "052_karcher",
    "054_della_linear", "057_della", "059_breadcrumbs_ties", "060_slerp", "066_dare_ties", "069_task_arithmetic",
    "073_slerp",
}  # fmt: skip

Served = Callable[[Path], None]

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not CONFIGS.is_dir(), reason="the collection of mergekit files lies beside the project only"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Puts stand-ins of the models and adapters that a recipe names on the Hub, each once."""
    folder = tmp_path_factory.mktemp("found")
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        use_hub(patch, hub, folder / "cache")

        def serve(path: Path) -> None:
            refs = load_recipe(path).refs
            for ref in [*refs, *(ref.adapter for ref in refs if ref.adapter)]:
                name = str((ref.bare if isinstance(ref, ModelRef) else ref).repo_id)
                if name not in hub.repos:
                    hub.add(name, write_found(name, folder / name))

        yield serve


def paths() -> list[Path]:
    """Mixtures of experts are in `test_moe.py`."""
    return [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.endswith("_moe")]


@pytest.mark.parametrize("path", paths(), ids=lambda path: path.stem)
def test_it_plans_or_is_refused_rightly(path: Path, served: Served) -> None:
    wrong = EVOLVE if path.stem.endswith("evolve") else WRONG.get(path.stem)
    if wrong is not None:
        with pytest.raises(RecipeError) as raised:
            load_recipe(path)
        assert re.search(wrong, str(raised.value)), str(raised.value)
        return
    served(path)
    if path.stem in APART:
        with pytest.raises(MismatchError) as apart:
            Merge(path)
        assert re.search(APART[path.stem], str(apart.value)), str(apart.value)
        return
    assert path.stem in PLANNED
    merge = Merge(path)
    slices = [part.layers for part in merge.recipe.slices if part.layers]
    layers = {name.split(".")[2] for name in merge.plan.tensors if name.startswith("model.layers.")}
    first = merge.checkpoints[merge.recipe.refs[0]]
    assert len(layers) == (sum(slices) or first.config["num_hidden_layers"])
    assert merge.merged.config["num_hidden_layers"] == len(layers)
    if len(slices) < 2:
        assert {name: spec.shape for name, spec in merge.plan.specs.items()} == {
            name: spec.shape for name, spec in first.tensors.items()
        }


def test_every_file_has_an_outcome() -> None:
    listed = {*WRONG, *APART, *PLANNED}
    assert listed == {path.stem for path in paths() if not path.stem.endswith("evolve")}
