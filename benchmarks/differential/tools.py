"""Both tools, each as `run(configuration) -> tensors`: ours in this process, mergekit in one that stays."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

VERSION = "0.1.5"
INSTALL = f"""mergekit {VERSION} is needed in an environment of its own (it is not part of this project's):

    python3 -m venv mergekit-env
    mergekit-env/bin/pip install torch==2.13.0      # first: any other torch is a download of gigabytes
    mergekit-env/bin/pip install mergekit=={VERSION}

then: --mergekit mergekit-env/bin/python"""

# Runs in mergekit's environment. One line of JSON in, one out; what mergekit prints goes to stderr.
_DRIVER = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
import importlib.metadata, logging
import torch, yaml
torch.set_num_threads(1)
logging.disable(logging.CRITICAL)
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
print(json.dumps({"version": importlib.metadata.version("mergekit")}), file=answers)
for line in sys.stdin:
    asked = json.loads(line)
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(asked["text"]))
        options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=asked["whole"],
                               random_seed=asked["seed"], lora_merge_cache=asked["adapted"])
        run_merge(config, asked["output"], options)
        answer = {"error": None}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers)
"""
_PATIENCE = 180  # seconds for one merge of a tiny model, or for the imports


@dataclass(frozen=True)
class Outcome:
    """What a tool made of a configuration: tensors, or the error with which it refused."""

    tensors: Mapping[str, Tensor]
    error: str | None = None
    config: Mapping[str, Any] | None = None  # the output's config.json
    tokens: Mapping[str, int] = field(default_factory=dict)  # of its tokenizer.json

    def in_order_of(self, other: Outcome) -> Outcome:
        """The same with its tokens' rows where the other has them. (mergekit numbers a union anew in every run.)"""
        if self.tokens == other.tokens or self.tokens.keys() != other.tokens.keys():
            return self
        rows = [self.tokens[token] for token in sorted(other.tokens, key=lambda token: other.tokens[token])]
        placed = {n: t[rows] if _is_by_token(n) else t for n, t in self.tensors.items()}
        return replace(self, tensors=placed, tokens=other.tokens)


class Ours:
    """ctl_merge in this process."""

    name = "ctl-merge"

    def run(self, text: str, seed: int | None = None, whole: bool = False) -> Outcome:
        import ctl_merge

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(text if seed is None else f"{text}seed: {seed}\n")
            try:
                return _read(ctl_merge.merge(path, Path(folder) / "out", num_workers=1).folder)
            except ctl_merge.CtlMergeError as error:
                return Outcome({}, str(error))


class Mergekit:
    """mergekit in the Python of its own environment; the process stays, as its imports take seconds."""

    name = "mergekit"

    def __init__(self, python: str) -> None:
        found = shutil.which(python)
        if found is None:
            raise FileNotFoundError(f"there is no {python}\n{INSTALL}")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        env.pop("PYTHONPATH", None)
        self._adapted = tempfile.TemporaryDirectory()  # where it keeps bases with their adapters
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [found, "-c", _DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=env
        )
        version = self._answer()["version"]
        if version != VERSION:
            self.close()
            raise RuntimeError(f"{python} has mergekit {version}: it is compared with {VERSION}\n{INSTALL}")

    def run(self, text: str, seed: int | None = None, whole: bool = False) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            output = str(Path(folder) / "out")
            asked = {"text": text, "output": output, "seed": seed, "whole": whole, "adapted": self._adapted.name}
            assert self._process.stdin
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            error = self._answer()["error"]
            return Outcome({}, error) if error is not None else _read(Path(output))

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        ready, _, _ = select.select([self._process.stdout], [], [], _PATIENCE)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._log.seek(0)
            tail = "".join(self._log.readlines()[-5:])
            state = "ended" if ready else f"has not answered for {_PATIENCE} s"
            self.close()
            raise RuntimeError(f"mergekit's process {state}:\n{tail}\n{INSTALL}")
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        self._adapted.cleanup()

    def __enter__(self) -> Mergekit:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(folder: Path) -> Outcome:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    config, tokenizer = (_json(folder / name) for name in ("config.json", "tokenizer.json"))
    tokens = dict(tokenizer["model"]["vocab"]) if tokenizer and isinstance(tokenizer["model"]["vocab"], dict) else {}
    tokens |= {token["content"]: token["id"] for token in (tokenizer or {}).get("added_tokens", [])}
    return Outcome(tensors, config=config, tokens=tokens)


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _is_by_token(tensor: str) -> bool:
    return "embed_tokens" in tensor or "lm_head" in tensor
