"""Reads a checkpoint folder: config.json and safetensors files, whole or sharded. Never pickle."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from services.worker.engine.model.interface import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json, so it is not a model folder.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: model.safetensors, else those its index names, else all in the folder."""
    index = folder / INDEX_FILE
    if (single := folder / SINGLE_FILE).is_file():  # first, as transformers has it
        files = [single]
    elif index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}, which {INDEX_FILE} names.")
    if not files:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = f"only {', '.join(pickled)}: pickle can run code, so it is never read" if pickled else "no weights"
        raise ModelError(f"{folder} holds no .safetensors file, {found}.")
    return files


class Checkpoint:
    """The tensors of a checkpoint by name; a context manager that keeps their files open."""

    def __init__(self, folder: Path) -> None:
        self._files = ExitStack()
        self._holders: dict[str, Any] = {}
        for path in weight_files(folder):
            opened = self._files.enter_context(safe_open(path, framework="pt"))
            self._holders |= dict.fromkeys(opened.keys(), opened)
        self._unread = set(self._holders)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._holders

    @property
    def unread(self) -> set[str]:
        """Names that nobody has asked for yet."""
        return self._unread

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A copy of the tensor in memory of its own: the file's is neither aligned nor safe from being rewritten."""
        if name not in self._holders:
            raise ModelError(f"The checkpoint has no tensor {name}.")
        tensor: Tensor = self._holders[name].get_tensor(name)
        if tensor.shape != shape:
            raise ModelError(f"Tensor {name} has shape {list(tensor.shape)}, but config.json says {list(shape)}.")
        self._unread.discard(name)
        return tensor.to(device, dtype, copy=True)
