"""Checkpoints in pytorch_model.bin files; nothing in them is executed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

from ctl_merge.checkpoint import FileCheckpoint, torch_dtype
from ctl_merge.deferred import Tensor, torch
from ctl_merge.errors import CheckpointError
from ctl_merge.header import TensorSpec
from ctl_merge.hub import HubSnapshot
from ctl_merge.reference import ModelRef
from ctl_merge.stored import check_names, read_json

_CODES = {torch_dtype(code): code for code in ("F16", "BF16", "F32", "F64", "BOOL", "U8", "I8", "I16", "I32", "I64")}


class PickledCheckpoint(FileCheckpoint):
    """Tensors mapped from zip-format `.bin` files by `torch.load(weights_only=True, mmap=True)`."""

    def __init__(
        self, ref: ModelRef, folder: Path, files: Sequence[str], sizes: Mapping[str, int],
        snapshot: HubSnapshot | None = None, config: str = "config.json",
    ) -> None:  # fmt: skip
        self.ref, self.name, self.folder, self.snapshot = ref, ref.text, folder, snapshot
        self.config = read_json(folder / config, self.name)
        self.file_sizes = sizes
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            self._tensors |= self._load(file)
        check_names(self.name, self._tensors)
        self.tensors = {n: TensorSpec(_CODES[t.dtype], tuple(t.shape)) for n, t in self._tensors.items()}

    def fetch(self) -> None:
        """Nothing to do: a pickle has no header, so its file was needed to know its tensors."""

    def read_into(self, tensor: str, out: Tensor, start: int = 0) -> None:
        out.copy_(self._tensors[tensor].reshape(-1)[start : start + out.numel()])

    def _load(self, file: str) -> Mapping[str, Tensor]:
        where = f"{self.name}: {file}"
        advice = "Convert the model to safetensors where you trust it, and name the result."
        try:
            state = torch.load(self.folder / file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{where} holds more than tensors, which would have to be executed. {advice}"
            ) from None
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{where} cannot be mapped ({reason}): truncated, or an old format. {advice}"
            ) from None
        if not isinstance(state, dict) or not all(_is_plain(name, tensor) for name, tensor in state.items()):
            raise CheckpointError(f"{where} is not a table of tensors. {advice}")
        return {name: tensor.detach() for name, tensor in state.items()}  # parameters ask for gradients


def _is_plain(name: object, tensor: object) -> bool:
    dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.dtype in _CODES
    return isinstance(name, str) and dense
