"""Turns a GGUF file into a model folder: config.json, safetensors and the tokenizer's files.

Weights become float32: that is what the quantized formats' own dequantization yields, and bfloat16 would round it a
second time. Knows nothing of where models are kept.
"""

import io
import mmap
import os
import struct
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

from services.worker.engine.model.pretrained import load_pretrained

Progress = Callable[[str, float], None]  # what is being done, and which part of the whole is behind it (0 to 1)

VERSION = 1  # enters the name of what is kept: raise it when the files that a conversion writes change


def convert_gguf(source: Path, target: Path, progress: Progress) -> None:
    """Writes the model in `source` into the empty folder `target`. Takes about 30 s for 135M parameters."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder, name = source.parent, source.name
    progress("reading the model's description", 0.0)
    config = transformers.AutoConfig.from_pretrained(folder, gguf_file=name)
    progress("reading the tokenizer", 0.2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    _split_digits(tokenizer, source)
    progress("dequantizing the weights", 0.4)
    with redirect_stderr(io.StringIO()):  # it draws a bar that no setting turns off
        model = load_pretrained(
            folder,
            gguf_file=name,
            config=config,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
    progress("writing safetensors", 0.9)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors lets only the owner read, but a store may be shared
        _flush(file)
    progress("converted", 1.0)


def _split_digits(tokenizer: object, source: Path) -> None:
    """Restores the pre-tokenizer of the SmolLM family, which transformers does not take from a GGUF.

    These vocabularies were learned with each digit apart and otherwise as GPT-2's; llama.cpp names that "smollm".
    """
    from tokenizers import pre_tokenizers

    if pre_tokenizer_name(source) == "smollm":
        backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def pre_tokenizer_name(source: Path) -> str | None:
    """`tokenizer.ggml.pre` of a GGUF file, which is a string (type 8) with 64-bit lengths, little-endian."""
    key = b"tokenizer.ggml.pre"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<I", 8)
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(entry)
        if start < 0:
            return None
        start += len(entry)
        (length,) = struct.unpack_from("<Q", content, start)
        return content[start + 8 : start + 8 + length].decode()


def _flush(file: Path) -> None:
    """Brings a file onto the disk, so that a rename that survives a crash never names an empty one."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
