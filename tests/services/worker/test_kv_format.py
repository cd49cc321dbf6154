"""Whatever changes the KV of a block changes the KV format's name."""

from pathlib import Path
from typing import Any

from services.worker.kv_format import kv_format

SIZE = 3 * 1024 * 1024


def write_model(folder: Path, *, config: str = "{}", changed_byte: int | None = None) -> Path:
    folder.mkdir()
    weights = bytearray(SIZE)
    if changed_byte is not None:
        weights[changed_byte] = 1
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def name_of(folder: Path, **changed: Any) -> str:
    settings = {"dtype": "float32", "quantization": "none", "block_size": 16, "implementation": "native"}
    return kv_format(folder, **{**settings, **changed})


def test_equal_models_have_one_name_wherever_they_lie(tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    assert name_of(one) == name_of(other)
    assert len(name_of(one)) == 32


def test_each_part_counts(tmp_path: Path) -> None:
    model = write_model(tmp_path / "a")
    names = {
        name_of(model),
        name_of(model, dtype="bfloat16"),
        name_of(model, quantization="int8"),
        name_of(model, quantization="int4"),
        name_of(model, block_size=32),
        name_of(model, implementation="compiled"),
        name_of(model, implementation="transformers"),
        name_of(model, numerics="avx2"),
    }
    for number, other in enumerate(({"config": '{"a": 1}'}, {"changed_byte": 0}, {"changed_byte": 2 * 1024 * 1024})):
        names.add(name_of(write_model(tmp_path / str(number), **other)))  # type: ignore[arg-type]
    assert len(names) == 11
