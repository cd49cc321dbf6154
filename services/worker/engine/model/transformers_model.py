"""The general path: any causal LM of transformers whose attention goes through the attention interface.

transformers computes everything but the attention, over one flat row of tokens with explicit positions and no cache of
its own; each layer's attention comes here, writes the pool and reads it. No mask is ever built by transformers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from services.worker.engine.batcher import Batch
from services.worker.engine.kernels.interface import Kernels
from services.worker.engine.kernels.paged_kv import LayerKV, PagedKV
from services.worker.engine.kernels.step_inputs import StepInputs, begin_step
from services.worker.engine.model.checkpoint import weight_files
from services.worker.engine.model.interface import ModelError, ModelFacts, first_line
from services.worker.engine.model.pretrained import FOREIGN_ERRORS, load_pretrained
from services.worker.engine.model.transformers_probe import examine, verify


class TransformersModel:
    """Fulfills `CausalModel` around a PreTrainedModel. Raises ModelError with the reason when it cannot be paged."""

    def __init__(self, model: Any, kernels: Kernels) -> None:
        from transformers import AttentionInterface

        own_attention = model.config._attn_implementation
        text_config = model.config.get_text_config(decoder=True)
        self._model = model
        self._kernels = kernels
        self._step: tuple[StepInputs, Sequence[LayerKV]] | None = None  # what the running forward works on
        shapes = examine(model)
        self._facts = ModelFacts(
            implementation="transformers",
            vocabulary_size=text_config.vocab_size,
            max_context_tokens=_max_context_tokens(text_config),
            layer_shapes=shapes,
            weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
            dtype=model.dtype,
            device=model.device,
        )
        # One name per model: the registry of transformers is global, the pool is not.
        self._attention = f"headrace_paged_{id(self)}"
        AttentionInterface.register(self._attention, self._attend)
        verify(self._facts, self._verified_forward, self._own_logits(own_attention))
        model.set_attn_implementation(self._attention)

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: PagedKV) -> Tensor:
        return self._compute(begin_step(batch, kv, self._facts.device), kv.layers)

    def _compute(self, step: StepInputs, layers: Sequence[LayerKV]) -> Tensor:
        self._step = step, layers
        try:
            output = self._model(
                input_ids=step.tokens[None],
                position_ids=step.positions[None],
                use_cache=False,
                logits_to_keep=step.sampled_rows,
            )
        finally:
            self._step = None
        logits: Tensor = output.logits[0]
        return logits.float()

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_arguments: Any,
    ) -> tuple[Tensor, None]:
        """The attention function that transformers calls: query [1, heads, T, dim] -> [1, T, heads, dim]."""
        assert self._step is not None, "attention runs only within forward"
        step, layers = self._step
        index = module.layer_idx
        assert isinstance(index, int), "checked by the probe"
        self._kernels.write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), layers[index], step)
        attended = self._kernels.attend(
            query[0].transpose(0, 1),
            layers[index],
            step,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=sliding_window,
            softcap=softcap,
        )
        return attended[None], None

    def _verified_forward(self, step: StepInputs, layers: Sequence[LayerKV]) -> Tensor:
        self._model.set_attn_implementation(self._attention)
        return self._compute(step, layers)

    def _own_logits(self, attention: str) -> Any:
        def logits(ids: Tensor) -> Tensor:
            self._model.set_attn_implementation(attention)
            output: Tensor = self._model(input_ids=ids, use_cache=False).logits
            return output

        return logits


def _max_context_tokens(text_config: Any) -> int:
    """Positions up to which a token's rotary embedding depends on its own position alone.

    longrope has a second set of frequencies for sequences beyond the original context, which transformers takes for a
    whole step as soon as one of its requests is that long. dynamic changes its own too, but only beyond
    max_position_embeddings.
    """
    rope = getattr(text_config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one for all layers, or per layer type
    limits: list[int] = [text_config.max_position_embeddings]
    limits += [part["original_max_position_embeddings"] for part in parts if part.get("rope_type") == "longrope"]
    return min(limits)


def load_transformers(
    folder: Path, kernels: Kernels, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool
) -> TransformersModel:
    """Loads the model in `folder` through transformers. Raises ModelError with the reason when it cannot be run."""
    from transformers.utils.logging import disable_progress_bar

    weight_files(folder)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = load_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with torch.inference_mode():
            return TransformersModel(model.to(device).eval(), kernels)
    except FOREIGN_ERRORS as error:
        raise ModelError(f"transformers cannot run it: {first_line(error)}") from error
