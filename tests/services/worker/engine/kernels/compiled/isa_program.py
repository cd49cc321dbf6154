"""Compiles a model for one instruction set and prints what came of it as JSON; a process has but one set.

Usage: python -m tests.services.worker.engine.kernels.compiled.isa_program NAME MODEL_FOLDER
"""

import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

from services.worker.engine.kernels.compiled.isa import Isa, choose_isa
from services.worker.engine.model.loading import load_model

LOADED: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "int4 bfloat16": {"dtype": "bfloat16", "quantize": "int4"},
}


def main(name: Any, folder: Path) -> None:
    choose_isa(name)  # before anything to compile is defined
    results = {}
    for precision, settings in LOADED.items():
        model, assembly = load(folder, implementation="compiled", instruction_set=name, **settings)
        results[precision] = {
            "instruction_set": model.facts.instruction_set,
            **compare(model, folder, precision, choose_isa(name)),
            **instructions(assembly),
        }
    print(json.dumps(results))


def load(folder: Path, **settings: Any) -> tuple[Any, str]:
    """The model, and its kernels as assembly: they are compiled in this process, to have that."""
    from services.worker.engine.kernels.compiled.library import archive_of, compile_kernels
    from services.worker.engine.kernels.compiled.step import make_kernels
    from services.worker.engine.model import compiled_llama

    kernels = {}

    def compile_here(isa: Isa, shape: Any) -> bytes:
        kernels.update(compile_kernels(make_kernels(isa, shape)))
        return archive_of(kernels)

    with patch.object(compiled_llama, "compile_apart", compile_here):
        model = load_model(folder, **settings)
    return model, "\n".join(kernel._library.get_asm_str() for kernel in set(kernels.values()))


def compare(model: Any, folder: Path, precision: str, isa: Isa) -> dict[str, Any]:
    """With the twin, and with itself when nothing is computed together."""
    from tests.services.worker.engine.compiled_models import (
        PRECISIONS,
        Job,
        Pool,
        load_twin,
        mixed_jobs,
        relative_errors,
        serve,
    )

    with tempfile.TemporaryDirectory() as scratch:
        twin = load_twin(folder, PRECISIONS[precision], Path(scratch), isa)
        expected = serve(twin, Pool(twin, dtype=model.facts.dtype), mixed_jobs())
    logits = serve(model, Pool(model), mixed_jobs())
    alone = [serve(model, Pool(model), [Job(job.tokens, job.cuts[-1:])])[0] for job in mixed_jobs()]
    errors = relative_errors(logits, expected)
    return {
        "best error": errors.quantile(0.1).item(),
        "worst error": errors.max().item(),
        "invariant": all(ours.equal(theirs) for ours, theirs in zip(logits, alone, strict=True)),
    }


def instructions(assembly: str) -> dict[str, Any]:
    """Counts of the vector registers and of some instructions."""
    registers = Counter(re.findall(r"%([txyz]mm)\d", assembly))
    # Instructions of AVX and later begin with v.
    return {
        **registers,
        "avx": len(re.findall(r"^\s+v[a-z0-9]+\s", assembly, re.M)),
        "byte dots": assembly.count("vpdpbusd"),
        "bfloat16 dots": assembly.count("vdpbf16ps"),
        "matrix products": assembly.count("tdpbf16ps"),
        "byte matrices": assembly.count("tdpbsud"),
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
