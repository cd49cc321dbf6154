"""Compiles kernels, each once, and keeps the machine code on disk: compiling takes ten times as long as loading.

What is kept is named by everything it depends on: the kernels' source, numba, the processor and what they are made for.
"""

import inspect
import io
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba import cfunc, types
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys

log = logging.getLogger(__name__)

Sources = Mapping[str, Callable[..., None]]


@dataclass(frozen=True, slots=True)
class Library:
    """Addresses of compiled functions by name; the code lives as long as this does."""

    addresses: Mapping[str, int]
    _engine: Any  # which the code ends with


def kept_library(compile_: Callable[[], bytes], made_for: str, folder: Path | None) -> Library:
    """What `compile_` gives, an archive as of `archive_of`, or gave before if that was kept in `folder`.

    `made_for` says what else than the kernels' source the functions depend on. A folder that cannot be read or written
    costs the time to compile, and is logged.
    """
    if folder is None:
        return load_kernels(compile_())
    file = folder / f"{_name(made_for)}.zip"
    try:
        return load_kernels(file.read_bytes())
    except FileNotFoundError:
        log.info("compiling kernels for this processor")
    except (OSError, ValueError) as error:
        log.warning("compiling kernels again, since %s cannot be used: %s", file, error)
    archive = compile_()
    try:
        _save(file, archive)
    except OSError as error:
        log.warning("compiled kernels cannot be kept, so each start compiles them: %s", error)
    return load_kernels(archive)


def compile_kernels(sources: Sources) -> dict[str, Any]:
    """numba's compiled functions by name, of functions whose arguments are all int64."""
    done: dict[Callable[..., None], Any] = {}
    for function in sources.values():
        if function not in done:  # it may have two names
            arguments = len(inspect.signature(function).parameters)
            signature = types.void(*[types.int64] * arguments)
            done[function] = cfunc(signature, nopython=True, error_model="numpy")(function)
    return {name: done[function] for name, function in sources.items()}


def archive_of(kernels: Mapping[str, Any]) -> bytes:
    """The machine code of what `compile_kernels` gives."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as entries:
        for name, kernel in kernels.items():
            # numba's own way to keep code is tied to one source file per function, and cannot see what that imports.
            _, _, (object_code, _) = kernel._library.serialize_using_object_code()
            entries.writestr(f"{name}/symbol", kernel.native_name)
            entries.writestr(f"{name}/object", object_code)
    return archive.getvalue()


def load_kernels(archive: bytes) -> Library:
    """The functions in what `archive_of` gave, in this process or another. ValueError if it is no such archive.

    They are linked among themselves alone. numba names what it compiles by numbers that begin anew in each process, so
    that in an engine with others a function could be bound to one that is named alike and does something else.
    """
    rtsys.initialize(cpu_target.target_context)  # what array code refers to
    engine = llvm.create_mcjit_compiler(
        llvm.parse_assembly(""), llvm.Target.from_default_triple().create_target_machine()
    )
    symbols: dict[str, str] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as entries:
            for name in sorted({entry.split("/")[0] for entry in entries.namelist()}):
                symbol = entries.read(f"{name}/symbol").decode()
                if symbol not in symbols.values():
                    engine.add_object_file(llvm.ObjectFileRef.from_data(entries.read(f"{name}/object")))
                symbols[name] = symbol
    except (zipfile.BadZipFile, KeyError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    engine.finalize_object()
    addresses = {name: engine.get_function_address(symbol) for name, symbol in symbols.items()}
    if not all(addresses.values()):
        raise ValueError("it lacks a function")
    return Library(addresses, engine)


def sources_digest() -> str:
    """32 hex digits that name the kernels' sources."""
    digest = sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _name(made_for: str) -> str:
    digest = sha256(sources_digest().encode())
    processor = f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    compiled_for = f"{numba.config.CPU_NAME} {numba.config.CPU_FEATURES}"
    for part in (numba.__version__, llvmlite.__version__, processor, compiled_for, made_for):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def _save(file: Path, archive: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as unfinished:
        unfinished.write(archive)
    os.replace(unfinished.name, file)
