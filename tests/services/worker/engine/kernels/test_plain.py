"""The plain kernels against formulas written out, one query at a time."""

import math

import pytest
import torch
from torch import Tensor

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.kernels.paged_kv import LayerShape, PagedKV
from services.worker.engine.kernels.plain import PlainKernels
from services.worker.engine.kernels.step_inputs import build_step_inputs
from tests.services.worker.engine.tiny_models import make_sequence

KERNELS = PlainKernels()
CPU = torch.device("cpu")


def attend_slowly(query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None) -> Tensor:
    """One query [heads, dim] over the keys that it sees, [tokens, kv_heads, dim]."""
    heads = []
    for head in range(len(query)):
        shared = head // (len(query) // keys.shape[1])
        scores = keys[:, shared] @ query[head] * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        heads.append(torch.softmax(scores, 0) @ values[:, shared])
    return torch.stack(heads)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attend_over_a_mixed_batch(window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    shape = LayerShape(kv_heads=2, key_dim=8, value_dim=6)
    kv = PagedKV([shape], num_blocks=32, block_size=4, dtype=torch.float32, device=CPU)
    blocks = torch.randperm(32).tolist()
    # (context with this step, tokens of this step): decodes of several sizes, a fresh prefill, two resumed ones
    cases = [(1, 1), (9, 1), (10, 1), (23, 1), (7, 7), (11, 4), (16, 15)]
    contexts, slices = [], []
    for length, new in cases:
        sequence = make_sequence([0] * length, [blocks.pop() for _ in range(-(-length // 4))])
        keys, values = torch.randn(length, 2, 8), torch.randn(length, 2, 6)
        everything = build_step_inputs(Batch((Slice(sequence, 0, length),)), 4, CPU)
        KERNELS.write_kv(keys, values, kv.layers[0], everything)
        contexts.append((keys, values))
        slices.append(Slice(sequence, length - new, new))
    step = build_step_inputs(Batch(tuple(slices)), 4, CPU)
    query = torch.randn(len(step.tokens), 4, 8)
    scale = 1 / math.sqrt(8)
    attended = KERNELS.attend(query, kv.layers[0], step, scale=scale, window=window, softcap=softcap)
    row = 0
    for (length, new), (keys, values) in zip(cases, contexts, strict=True):
        for position in range(length - new, length):
            seen = slice(0 if window is None else max(0, position + 1 - window), position + 1)
            expected = attend_slowly(query[row], keys[seen], values[seen], scale, softcap)
            torch.testing.assert_close(attended[row], expected, rtol=1e-5, atol=1e-5)
            row += 1


def test_rms_norm() -> None:
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 10.0])
    root = math.sqrt(12.5 + 1e-6)
    torch.testing.assert_close(KERNELS.rms_norm(x, weight, 1e-6), torch.tensor([[6 / root, 40 / root]]))


def test_rotate_turns_each_pair_by_its_angle() -> None:
    angles = torch.tensor([0.3, 1.1])
    cos, sin = angles.cos(), angles.sin()
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    first, second = x[0, 0, :2], x[0, 0, 2:]
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin))
    rotated = KERNELS.rotate(x, torch.cat((cos, cos)).view(1, 1, 4), torch.cat((-sin, sin)).view(1, 1, 4))
    torch.testing.assert_close(rotated[0, 0], expected)


def test_swiglu() -> None:
    gate_up = torch.tensor([[0.0, 1.0, 5.0, 3.0]])
    torch.testing.assert_close(KERNELS.swiglu(gate_up), torch.tensor([[0.0, 3 / (1 + math.exp(-1))]]))
