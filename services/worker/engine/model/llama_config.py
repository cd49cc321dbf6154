"""config.json of a Llama-shaped model, read without transformers. Refuses by reason what the fast path cannot run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.worker.engine.kernels.paged_kv import LayerShape
from services.worker.engine.model.interface import ModelError
from services.worker.engine.model.rope import ROPE_TYPES

ConfigJson = Mapping[str, Any]

DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # elsewhere as many as query heads


class NotLlamaShaped(ModelError):
    """The fast path cannot run this model; the sentence says why."""


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The architecture of one Llama-shaped model."""

    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Mapping[str, Any]
    windows: tuple[int | None, ...]  # per layer: how many keys a query sees
    tied_embeddings: bool
    qk_norm: bool
    max_context_tokens: int

    @property
    def layer_shapes(self) -> tuple[LayerShape, ...]:
        return (LayerShape(self.kv_heads, self.head_dim, self.head_dim),) * self.layers

    @property
    def layer_matrices(self) -> tuple[tuple[int, int], ...]:
        """(columns, depth) of what a layer multiplies with: QKV, attention's output, gate and up, down."""
        hidden, inner, queries = self.hidden_size, self.intermediate_size, self.heads * self.head_dim
        qkv = queries + 2 * self.kv_heads * self.head_dim
        return (qkv, hidden), (hidden, queries), (2 * inner, hidden), (hidden, inner)


def parse_llama_config(config: ConfigJson) -> LlamaConfig:
    """Raises NotLlamaShaped for other families and for features that only the general path has.

    Where a key is absent, the default of that family in transformers holds.
    """
    family = config.get("model_type")
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        raise NotLlamaShaped(f"model type {family!r} is not Llama-shaped")
    if config.get("hidden_act", "silu") != "silu":
        raise NotLlamaShaped(f"activation {config['hidden_act']!r} is not silu")
    if "quantization_config" in config:
        raise NotLlamaShaped("the checkpoint is quantized")
    try:
        heads = config["num_attention_heads"]
        default_kv_heads = DEFAULT_KV_HEADS.get(family, heads)
        default_head_dim = 128 if family == "qwen3" else config["hidden_size"] // heads
        return LlamaConfig(
            vocabulary_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads", default_kv_heads) or heads,
            head_dim=config.get("head_dim") or default_head_dim,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=_rope(config),
            windows=_windows(config),
            tied_embeddings=config.get("tie_word_embeddings", False),
            qk_norm=family == "qwen3",
            max_context_tokens=config["max_position_embeddings"],
        )
    except KeyError as error:
        raise ModelError(f"config.json of a {family} model must have {error}.") from None


def _rope(config: ConfigJson) -> dict[str, Any]:
    """The rope parameters in their present form; older files keep theta apart and call the rest rope_scaling."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    if rope["rope_type"] not in ROPE_TYPES:
        raise NotLlamaShaped(f"rope type {rope['rope_type']!r} is not one of {', '.join(sorted(ROPE_TYPES))}")
    if (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise NotLlamaShaped("only a part of each head is rotated")
    return rope


def _windows(config: ConfigJson) -> tuple[int | None, ...]:
    layers: int = config["num_hidden_layers"]
    match config["model_type"]:
        case "llama":
            return (None,) * layers
        case "mistral":
            return (config.get("sliding_window", 4096),) * layers
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    full_layers = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or ["full_attention"] * full_layers + ["sliding_attention"] * layers
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise NotLlamaShaped(f"its layer types are {', '.join(sorted(set(kinds)))}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers])
