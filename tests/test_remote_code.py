"""Models that bring code of their own: run when that is allowed, and only then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import recipe_text
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ctl_merge
from ctl_merge.architecture import empty_model
from ctl_merge.cli import app
from ctl_merge.errors import CheckpointError, DataError, DeviceError
from ctl_merge.merging import Merge
from ctl_merge.model import load_weights
from ctl_merge.reference import ModelRef
from ctl_merge.stored import open_checkpoint

CONFIGURATION = """
from pathlib import Path
from transformers import PretrainedConfig

Path({ran!r}).touch()

class TwistedConfig(PretrainedConfig):
    model_type = "twisted"

    def __init__(self, vocab_size=64, width=16, num_hidden_layers=3, twist=0.5, **kwargs):
        self.vocab_size, self.width, self.num_hidden_layers, self.twist = vocab_size, width, num_hidden_layers, twist
        super().__init__(**kwargs)
"""
MODELING = """
import torch
import yaml
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_twisted import TwistedConfig

class TwistedBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up, self.down = (nn.Linear(config.width, config.width) for _ in range(2))
        self.twist = config.twist

    def forward(self, hidden_states):
        mixed = hidden_states.cumsum(1) / torch.arange(1, hidden_states.shape[1] + 1)[None, :, None]
        return hidden_states + self.twist * self.down(torch.sin(self.up(mixed)))

class TwistedForCausalLM(PreTrainedModel):
    config_class = TwistedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(TwistedBlock(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, **kwargs):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return CausalLMOutput(logits=self.head(hidden))
"""
CONFIG = {
    "model_type": "twisted", "architectures": ["TwistedForCausalLM"], "vocab_size": 64, "width": 16,
    "num_hidden_layers": 3, "twist": 0.25, "dtype": "float32",
    "auto_map": {
        "AutoConfig": "configuration_twisted.TwistedConfig",
        "AutoModelForCausalLM": "modeling_twisted.TwistedForCausalLM",
    },
}  # fmt: skip
QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
SMALL: dict[str, Any] = {"sequences": 3, "length": 16}


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies code to its cache before it imports it from there."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        yield


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A base with code of its own and two finetunes, which have none; `ran` appears when the code runs."""
    found = [tmp_path / name for name in ("base", "one", "two")]
    generator = torch.Generator().manual_seed(0)
    tensors = {"embed.weight": (64, 16), "head.weight": (64, 16)}
    for i in range(3):
        tensors |= {f"blocks.{i}.{part}.weight": (16, 16) for part in ("up", "down")}
        tensors |= {f"blocks.{i}.{part}.bias": (16,) for part in ("up", "down")}
    base = {name: torch.randn(shape, generator=generator) / 4 for name, shape in tensors.items()}
    for seed, folder in enumerate(found):
        folder.mkdir()
        shifted = {n: t + (seed > 0) * 0.05 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        save(folder, shifted, CONFIG)
    (found[0] / "configuration_twisted.py").write_text(CONFIGURATION.format(ran=str(tmp_path / "ran")))
    (found[0] / "modeling_twisted.py").write_text(MODELING)
    return found


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER:
        (folder / file).write_bytes((QUICKSTART / "base" / file).read_bytes())


def recipe(folders: list[Path]) -> ctl_merge.Recipe:
    base, one, two = folders
    return ctl_merge.parse_recipe(
        recipe_text("task_arithmetic", [(one, {"weight": 0.6}), (two, {"weight": 0.3})], base)
    )


def ran(folders: list[Path]) -> bool:
    return (folders[0].parent / "ran").exists()


def trusted(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


REFUSED = r"'TwistedForCausalLM'; the model brings code of its own\. Read that code.*--trust-remote-code"


def test_the_code_is_refused_unless_it_is_trusted(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=REFUSED):
        ctl_merge.load_model(recipe(folders))
    with pytest.raises(CheckpointError, match=REFUSED):
        ctl_merge.probe(recipe(folders), **SMALL)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(folders).text)
    with pytest.raises(CheckpointError, match=REFUSED):
        CliRunner().invoke(app, ["probe", str(path)], catch_exceptions=False)
    assert not ran(folders)


def test_nothing_is_read_of_models_that_may_not_run(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes minutes to read large models."""
    monkeypatch.setattr("ctl_merge.probing.api.task_grams", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match=REFUSED):
        ctl_merge.probe(recipe(folders), **SMALL)
    with pytest.raises(CheckpointError, match=REFUSED):
        ctl_merge.probe_merged(str(folders[1]), [str(folders[2])], str(folders[0]), **SMALL)
    with pytest.raises(DeviceError, match="no module"):
        ctl_merge.probe(QUICKSTART / "ties.yaml", device_map='{"nowhere": "cpu"}', **SMALL)


def test_merging_runs_no_code(folders: list[Path], tmp_path: Path) -> None:
    merged = Merge(recipe(folders)).write(tmp_path / "merged").folder
    assert not ran(folders)
    assert (merged / "modeling_twisted.py").read_text() == MODELING


@pytest.mark.parametrize("device_map", ["cpu", "disk"])
def test_a_trusted_merge_is_what_from_pretrained_gives(device_map: str, folders: list[Path], tmp_path: Path) -> None:
    merged = Merge(recipe(folders)).write(tmp_path / "merged").folder
    found = ctl_merge.load_model(recipe(folders), device_map, trust_remote_code=True)
    assert ran(folders) and type(found).__module__.startswith("transformers_modules")
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, trusted(merged)(ids).logits)


def test_a_trusted_merge_is_probed(folders: list[Path], tmp_path: Path) -> None:
    """The parents have no code in their folders; all run the first model's. Blocks are found by the text's depth."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(folders).text)
    arguments = ["probe", str(path), "--trust-remote-code", "--sequences", "3", "--length", "16", "--json", "--null"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    blocks = [row for row in json.loads(done.stdout)["sets"]["cycle"]["blocks"] if row["part"] == "block"]
    assert [row["block"] for row in blocks] == [f"blocks.{i}" for i in range(3)]
    assert [list(row["effective_weight"].values()) for row in blocks] == [pytest.approx([0.6, 0.3], abs=1e-5)] * 3
    assert all(0 < row["nonlinearity"] < 1 for row in blocks)


def test_code_comes_before_transformers_own_only_if_it_is_trusted(folders: list[Path]) -> None:
    """As in from_pretrained: many repositories keep code that transformers has long had."""
    config = {
        **json.loads((QUICKSTART / "base" / "config.json").read_text()),
        "auto_map": {"AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"},
    }
    (folders[0] / "modeling_own.py").write_text(
        "import transformers\nclass LlamaForCausalLM(transformers.LlamaForCausalLM):\n    own = True\n"
    )
    assert not hasattr(empty_model(config, "m", folders[0]), "own")
    assert empty_model(config, "m", folders[0], trust_remote_code=True).own
    assert not hasattr(empty_model(config, "m", None, trust_remote_code=True), "own")


@pytest.mark.parametrize(
    "code, reason",
    [
        ("import nowhere_to_be_found", "ImportError: This modeling file requires the following packages"),
        ("raise RuntimeError('broken\\nlong story')", r"RuntimeError: broken\)$"),
        ("x = 1", "AttributeError: "),
        (None, "OSError: "),
    ],
    ids=["package", "error", "class", "file"],
)
def test_code_that_cannot_be_run_is_told(code: str | None, reason: str, folders: list[Path]) -> None:
    file = folders[0] / "modeling_twisted.py"
    file.unlink()
    if code is not None:
        file.write_text(code)
    checkpoint = open_checkpoint(ModelRef.parse(str(folders[0])))
    with pytest.raises(CheckpointError, match=f"the code that the model brings along cannot be run .{reason}"):
        load_weights(checkpoint, trust_remote_code=True)


def test_a_tokenizer_that_is_code_needs_trust_too(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(QUICKSTART / "base", base)
    (base / "tokenizer.json").rename(tmp_path / "table.json")
    own = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(own))
    (base / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nfrom tokenizers import Tokenizer\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n"
        "    def __init__(self, **kwargs):\n"
        f"        super().__init__(tokenizer_object=Tokenizer.from_file({str(tmp_path / 'table.json')!r}))\n"
    )
    models = [(QUICKSTART / name, {"weight": 0.5}) for name in ("cycle", "shift")]
    merge = ctl_merge.parse_recipe(recipe_text("task_arithmetic", models, base))
    with pytest.raises(DataError, match="the tokenizer of .*it is code .*--trust-remote-code"):
        ctl_merge.probe(merge, **SMALL)
    found = ctl_merge.probe(merge, trust_remote_code=True, **SMALL)
    assert found.data["sets"]["cycle"]["sequences"] == 3


def test_a_merge_is_probed_with_it_only_if_the_code_is_trusted(folders: list[Path], tmp_path: Path) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(json.dumps({**yaml.safe_load(recipe(folders).text), "probe": SMALL}))
    with pytest.raises(CheckpointError, match=REFUSED):
        CliRunner().invoke(app, [str(path), "-o", str(out), "--probe"], catch_exceptions=False)
    assert not ran(folders) and not list(tmp_path.glob("out*"))
    done = CliRunner().invoke(app, [str(path), "-o", str(out), "--probe", "--trust-remote-code"])
    assert done.exit_code == 0, done.output
    assert (out / "probe" / "probe.json").is_file()
