"""The name of a worker's KV format: blocks of equal chain hash and equal KV format hold the same KV.

It covers the model's configuration and weights, the dtype, the quantization, the implementation and the shape of a
block. It leaves out the numerics (instruction set, library versions), which differ by roundings: in the last bits, or
where a processor multiplies bfloat16 by itself, in those of bfloat16. A deterministic worker, which allows none, puts
them in: workers of its KV format compute as it does, bit by bit.
"""

from hashlib import sha256
from pathlib import Path

from services.worker.engine.model.checkpoint import weight_files

_STRIDE_BYTES = 1024 * 1024
_SAMPLE_BYTES = 4096
# Of quantizations that have been other ones under the same name.
_SCHEMES = {"int8": "int8 of rows, transformed"}


def kv_format(
    folder: Path, *, dtype: str, quantization: str, block_size: int, implementation: str, numerics: str = ""
) -> str:
    """32 hex digits that name the KV format of the model in `folder`.

    The weights enter with 4 KiB of every MiB and the size of each file: reading them whole would delay the start of a
    large model, and two sets of weights that differ do so throughout.
    """
    digest = sha256()
    for part in (
        dtype,
        str(block_size),
        implementation,
        f"quantization {_SCHEMES.get(quantization, quantization)}",
        "layout block,layer: k head,channel,token; v head,token,channel",
        *([f"numerics {numerics}"] if numerics else []),
    ):
        digest.update(part.encode() + b"\0")
    digest.update(sha256((folder / "config.json").read_bytes()).digest())
    for path in weight_files(folder):
        digest.update(_fingerprint(path))
    return digest.hexdigest()[:32]


def _fingerprint(path: Path) -> bytes:
    size = path.stat().st_size
    digest = sha256(str(size).encode())
    with path.open("rb") as file:
        for start in range(0, size, _STRIDE_BYTES):
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
