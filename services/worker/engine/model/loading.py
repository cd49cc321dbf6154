"""Loads a model folder: the fast path for Llama-shaped models, transformers for the rest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from services.worker.engine.kernels.interface import Kernels
from services.worker.engine.kernels.plain import PlainKernels
from services.worker.engine.model.checkpoint import read_config
from services.worker.engine.model.interface import CausalModel, ModelError
from services.worker.engine.model.llama import load_llama
from services.worker.engine.model.llama_config import NotLlamaShaped, parse_llama_config

Implementation = Literal["auto", "native", "transformers"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    implementation: Implementation = "auto",
    trust_remote_code: bool = False,
) -> CausalModel:
    """The model in `folder` (config.json and safetensors), ready to compute.

    dtype: float32, bfloat16, float16, or auto: what the checkpoint holds (float16 becomes float32 on a CPU, which
    computes it slowly). device: cpu, cuda or cuda:N. implementation: auto takes the fast path where it can.
    Raises ModelError with one sentence when the model cannot be run as asked.
    """
    config = read_config(folder)
    torch_device = _device(device)
    torch_dtype = _dtype(dtype, config, torch_device)
    kernels = PlainKernels()
    reason = "the transformers path was asked for"
    if implementation != "transformers":
        try:
            return load_llama(folder, parse_llama_config(config), kernels, torch_dtype, torch_device)
        except NotLlamaShaped as error:
            reason = str(error)
        if implementation == "native":
            raise ModelError(f"The fast path cannot run {folder}: {reason}.")
    return _general(folder, kernels, torch_dtype, torch_device, trust_remote_code)


def _general(
    folder: Path, kernels: Kernels, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> CausalModel:
    from services.worker.engine.model.transformers_model import load_transformers  # transformers is slow to import

    try:
        return load_transformers(folder, kernels, dtype, device, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(f"Cannot run {folder} through transformers: {str(error).rstrip('.')}.") from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device {name!r} is not cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {name!r} was asked for, but this torch ({torch.__version__}) finds no CUDA device.")
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r} is not cpu, cuda or cuda:N.")
    return device


def _dtype(name: str, config: Mapping[str, Any], device: torch.device) -> torch.dtype:
    if name == "auto":
        text_config = config.get("text_config", {})
        names = (config.get("dtype"), config.get("torch_dtype"), text_config.get("dtype"), "float32")
        name = next(candidate for candidate in names if candidate)
        if name == "float16" and device.type == "cpu":
            name = "float32"
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}.")
    return DTYPES[name]
