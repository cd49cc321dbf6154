"""Rotary position embeddings: frequencies per scaling type, and a step's cosines and sines."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ROPE_TYPES = frozenset({"default", "linear", "llama3"})


def inverse_frequencies(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """float32 [head_dim / 2]; `rope` holds rope_type, rope_theta and what that type needs.

    The types are those of Hugging Face configs. llama3 stretches low frequencies by `factor`, keeps high ones and
    blends between (Llama 3.1's reference code).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (float(rope["rope_theta"]) ** exponents)
    match rope["rope_type"]:
        case "default":
            return frequencies
        case "linear":
            return frequencies / float(rope["factor"])
        case "llama3":
            return _llama3(frequencies, rope)
        case other:
            raise ValueError(f"rope_type must be one of {sorted(ROPE_TYPES)}, not {other!r}")


def _llama3(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original_length = rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (original_length / wavelengths - low) / (high - low)
    stretched = torch.where(wavelengths > original_length / low, frequencies / factor, frequencies)
    blended = (1 - smooth) * stretched / factor + smooth * stretched
    between = (wavelengths >= original_length / high) & (wavelengths <= original_length / low)
    return torch.where(between, blended, stretched)


def cos_and_signed_sin(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For positions [T]: cos and sine with its first half negated, each [T, 1, head_dim] (see `Kernels.rotate`)."""
    angles = positions[:, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
