"""The kernels in plain torch: correct on every device and dtype, the twin that faster ones are tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from services.worker.engine.kernels.paged_kv import LayerKV
from services.worker.engine.kernels.step_inputs import AttentionGroup, StepInputs


class PlainKernels:
    """Fulfills `Kernels`."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def rotate(self, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def write_kv(self, key: Tensor, value: Tensor, layer: LayerKV, step: StepInputs) -> None:
        layer.key[step.slot_blocks, :, :, step.slot_offsets] = key
        layer.value[step.slot_blocks, :, step.slot_offsets] = value

    def attend(
        self,
        query: Tensor,
        layer: LayerKV,
        step: StepInputs,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        if len(step.groups) == 1:
            return _attend_group(query, layer, step.groups[0], scale, window, softcap)
        out = query.new_empty(*query.shape[:2], layer.value.shape[-1])
        for group in step.groups:
            out[group.rows] = _attend_group(query[group.rows], layer, group, scale, window, softcap)
        return out


def _attend_group(
    query: Tensor, layer: LayerKV, group: AttentionGroup, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """query [slices * query_length, heads, key_dim] -> [slices * query_length, heads, value_dim]."""
    key = _gather(layer.key.transpose(2, 3), group)
    value = _gather(layer.value, group)
    query = query.view(group.slices, group.query_length, *query.shape[1:]).transpose(1, 2)
    if softcap is not None:
        out = _softcapped(query, key, value, group.bias(window, query.dtype), scale, softcap)
    elif group.query_length == 1:
        # The query heads that share a KV head stand as that head's queries: no key is copied for them.
        packed = query.reshape(group.slices, key.shape[1], -1, query.shape[-1])
        bias = None if group.sees_everything(window) else group.bias(window, query.dtype)
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=bias, scale=scale)
        return out.reshape(group.slices, -1, value.shape[-1])
    elif group.is_plain_causal(window):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    else:
        bias = group.bias(window, query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _gather(pool: Tensor, group: AttentionGroup) -> Tensor:
    """The group's contexts out of the pool: [slices, kv_heads, context_length, head_dim]."""
    blocks = pool.index_select(0, group.tables.flatten()).view(*group.tables.shape, *pool.shape[1:])
    return blocks.transpose(1, 2).flatten(2, 3)[:, :, : group.context_length]


def _softcapped(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, softcap: float) -> Tensor:
    queries_per_head = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(queries_per_head, dim=1)
    value = value.repeat_interleave(queries_per_head, dim=1)
    scores = query @ key.transpose(2, 3) * scale
    scores = torch.tanh(scores / softcap) * softcap + bias
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value
