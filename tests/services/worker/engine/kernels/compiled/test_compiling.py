"""A compiler that fails says why. That it gives working kernels, every test of the compiled model shows."""

from dataclasses import fields

import pytest

from services.worker.engine.kernels.compiled.compiling import compile_apart
from services.worker.engine.kernels.compiled.frame import Shape
from services.worker.engine.kernels.compiled.isa import choose_isa


def test_what_cannot_be_compiled_is_told_with_its_reason() -> None:
    nothing = Shape(*[0] * len(fields(Shape)))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"(?s)^the kernels cannot be compiled \(exit status 1\): .*ZeroDivision"):
        compile_apart(choose_isa(), nothing)
