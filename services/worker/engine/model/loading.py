"""Loads a model folder: compiled on a CPU or in torch for Llama-shaped models, through transformers for the rest."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from services.worker.engine.kernels.compiled.isa import IsaName, choose_isa
from services.worker.engine.kernels.plain import PlainKernels
from services.worker.engine.model.checkpoint import read_config
from services.worker.engine.model.echo import echo_model
from services.worker.engine.model.interface import CausalModel, ModelError, Quantization
from services.worker.engine.model.llama import load_llama
from services.worker.engine.model.llama_config import NotLlamaShaped, parse_llama_config

log = logging.getLogger(__name__)

Implementation = Literal["auto", "compiled", "native", "transformers", "echo"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ORDER: tuple[Implementation, ...] = ("compiled", "native", "transformers")


def load_model(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    implementation: Implementation = "auto",
    instruction_set: Literal["auto"] | IsaName = "auto",
    quantize: Quantization = "none",
    block_size: int = 16,
    kernels: Path | None = None,
    trust_remote_code: bool = False,
    echo_step_s: float = 0.0,
) -> CausalModel:
    """The model in `folder` (config.json and safetensors), ready to compute.

    dtype: float32, bfloat16, float16, or auto: what the checkpoint holds (float16 becomes float32 on a CPU, which
    computes it slowly). device: cpu, cuda or cuda:N. implementation: auto takes the fastest that can run the model:
    compiled (CPU), native (torch), transformers; echo runs none of them and takes `echo_step_s` for each step.
    instruction_set and quantize are the compiled one's, and `block_size`
    is the KV pool's; it keeps its machine code in the folder `kernels`, and takes as many threads as torch.
    Raises ModelError with one sentence when the model cannot be run as asked.
    """
    config = read_config(folder)
    if implementation == "echo":
        return echo_model(config, echo_step_s, folder)
    torch_device = _device(device)
    torch_dtype = _dtype(dtype, config, torch_device)
    request = _Request(folder, config, torch_dtype, torch_device, quantize, block_size, kernels)
    reasons: list[str] = []
    for name in _ORDER if implementation == "auto" else (implementation,):
        try:
            match name:
                case "compiled":
                    return _compiled(request, instruction_set)
                case "native":
                    return _native(request)
                case _:
                    return _general(request, trust_remote_code)
        except NotLlamaShaped as error:
            reasons.append(str(error))
            log.info("not %s: %s", name, error)
    raise ModelError(f"The {implementation} path cannot run {folder}: {'; '.join(dict.fromkeys(reasons))}.")


@dataclass(frozen=True, slots=True)
class _Request:
    folder: Path
    config: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    quantize: Quantization
    block_size: int
    kernels: Path | None


def _compiled(request: _Request, instruction_set: Literal["auto"] | IsaName) -> CausalModel:
    if request.device.type != "cpu":
        raise NotLlamaShaped("it is for CPUs")
    config = parse_llama_config(request.config)
    try:
        isa = choose_isa(instruction_set)
    except ValueError as error:
        raise ModelError(f"The instruction set cannot be had: {error}.") from None
    # Only now: numba is slow to import, and looks at the processor as soon as a module defines something to compile.
    from services.worker.engine.model.compiled_llama import load_compiled_llama
    from services.worker.engine.model.packed_weights import why_not_compiled

    if reason := why_not_compiled(config, isa, request.dtype, request.quantize, request.block_size):
        raise NotLlamaShaped(reason)
    return load_compiled_llama(
        request.folder,
        config,
        isa,
        request.dtype,
        request.quantize,
        block_size=request.block_size,
        threads=torch.get_num_threads(),
        kernels=request.kernels,
    )


def _native(request: _Request) -> CausalModel:
    _refuse_quantization(request)
    return load_llama(request.folder, parse_llama_config(request.config), PlainKernels(), request.dtype, request.device)


def _refuse_quantization(request: _Request) -> None:
    if request.quantize != "none":
        raise NotLlamaShaped(f"{request.quantize} weights need the compiled path")


def _general(request: _Request, trust_remote_code: bool) -> CausalModel:
    from services.worker.engine.model.transformers_model import load_transformers  # transformers is slow to import

    _refuse_quantization(request)
    folder = request.folder
    try:
        return load_transformers(
            folder, PlainKernels(), request.dtype, request.device, trust_remote_code=trust_remote_code
        )
    except ModelError as error:
        raise ModelError(f"Cannot run {folder} through transformers: {str(error).rstrip('.')}.") from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device {name!r} is not cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {name!r} was asked for, but this torch ({torch.__version__}) finds no CUDA device.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {name!r} was asked for, but the last CUDA device is {torch.cuda.device_count() - 1}.")
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
