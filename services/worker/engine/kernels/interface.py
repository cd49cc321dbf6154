"""The contract of the kernels. `plain.py` fulfills it in plain torch; a faster set stands beside it and must agree."""

from typing import Protocol

from torch import Tensor

from services.worker.engine.kernels.paged_kv import LayerKV
from services.worker.engine.kernels.step_inputs import StepInputs


class Kernels(Protocol):
    """What a model's layers call. T is the number of rows in the step; no call keeps or changes its inputs."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last dimension; statistics in float32. Zhang & Sennrich 2019."""
        ...

    def rotate(self, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        """Rotary embedding of x [T, heads, head_dim] by cos and signed_sin, both [T, 1, head_dim]. Su et al. 2021.

        Element i is paired with i + head_dim / 2, as Hugging Face checkpoints have it. `signed_sin` is the sine with
        its first half negated.
        """
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up for gate_up [T, 2 * n] holding gate, then up; [T, n]. Shazeer 2020."""
        ...

    def write_kv(self, key: Tensor, value: Tensor, layer: LayerKV, step: StepInputs) -> None:
        """Writes key [T, kv_heads, key_dim] and value [T, kv_heads, value_dim] into the step's slots of the pool."""
        ...

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
        """Causal attention of query [T, heads, key_dim] over each sequence's keys in the pool; [T, heads, value_dim].

        The step's own keys and values are already written. heads is a multiple of kv_heads, consecutive query heads
        sharing one. With `window`, a query sees that many keys, its own included. With `softcap`, scores pass
        through softcap * tanh(score / softcap) before the softmax.
        """
        ...
