"""Whatever changes the KV of a block changes the KV format's name."""

from pathlib import Path

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


def test_equal_models_have_one_name_wherever_they_lie(tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    name = kv_format(one, dtype="float32", block_size=16, implementation="native")
    assert name == kv_format(other, dtype="float32", block_size=16, implementation="native")
    assert len(name) == 32


def test_each_part_counts(tmp_path: Path) -> None:
    model = write_model(tmp_path / "a")
    names = {
        kv_format(model, dtype="float32", block_size=16, implementation="native"),
        kv_format(model, dtype="bfloat16", block_size=16, implementation="native"),
        kv_format(model, dtype="float32", block_size=32, implementation="native"),
        kv_format(model, dtype="float32", block_size=16, implementation="transformers"),
    }
    for number, other in enumerate(({"config": '{"a": 1}'}, {"changed_byte": 0}, {"changed_byte": 2 * 1024 * 1024})):
        folder = write_model(tmp_path / str(number), **other)  # type: ignore[arg-type]
        names.add(kv_format(folder, dtype="float32", block_size=16, implementation="native"))
    assert len(names) == 7
