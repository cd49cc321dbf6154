"""A compiler that fails says why. That it gives working kernels, every test of the compiled model shows."""

from dataclasses import replace

import pytest

from services.worker.engine.kernels.compiled.compiling import compile_apart
from services.worker.engine.kernels.compiled.frame import Shape
from services.worker.engine.kernels.compiled.isa import choose_isa

SHAPE = Shape(
    layers=1,
    hidden=64,
    intermediate=64,
    heads=2,
    kv_heads=1,
    head_dim=32,
    vocabulary=50,
    eps=1e-5,
    qk_norm=False,
    block_size=16,
    weight_bits=32,
    activation_bits=32,
    matrices=False,
    head_bits=32,
    kv_bits=32,
    embedding_bits=32,
)


def test_what_cannot_be_compiled_is_told_with_its_reason() -> None:
    with pytest.raises(
        RuntimeError, match=r"(?s)^the kernels cannot be compiled \(exit status 1\): .*ZeroDivisionError"
    ):
        compile_apart(choose_isa(), replace(SHAPE, weight_bits=0))
