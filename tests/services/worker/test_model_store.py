"""What a name resolves to. The conversion itself is replaced, but for the default model at the end."""

import json
import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors
from tokenizers import Tokenizer

from services.worker import gguf_conversion, model_store
from services.worker.engine.model.interface import ModelError, ModelUnavailable
from services.worker.gguf_conversion import Progress, pre_tokenizer_name
from services.worker.model_store import no_progress, resolve


def fill(folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")


def fake_conversion(source: Path, target: Path, progress: Progress) -> None:
    """Fails if it runs twice for one store."""
    (target.parent / "conversions").open("x").close()
    progress("converting", 0.5)
    fill(target)


def resolve_together(source: Path, root: Path, start: Barrier) -> None:
    model_store.convert_gguf = fake_conversion  # type: ignore[attr-defined]
    start.wait()
    resolve(str(source), root=root)


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    fill(tmp_path)
    assert resolve(str(tmp_path)) == tmp_path


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        resolve(str(tmp_path))


def test_an_unknown_name_is_refused_with_what_a_name_may_be() -> None:
    with pytest.raises(ModelError, match=r"No model 'nonsense': a model is a local folder, .*SmolLM2"):
        resolve("nonsense")


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store, "convert_gguf", fake_conversion)
    source = tmp_path / "model.gguf"
    source.write_bytes(b"content")
    reports: list[tuple[str, float]] = []
    folder = resolve(str(source), root=tmp_path / "store", progress=lambda *report: reports.append(report))
    assert reports == [("converting", 0.5)]
    assert resolve(str(source), root=tmp_path / "store") == folder
    source.rename(tmp_path / "other name.gguf")
    assert resolve(str(tmp_path / "other name.gguf"), root=tmp_path / "store") == folder


def test_the_default_store_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store, "convert_gguf", fake_conversion)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"content")
    assert resolve(str(tmp_path / "model.gguf")).parent == tmp_path / "cache" / "headrace" / "models"


def test_two_processes_at_once_both_succeed_and_one_converts(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"content")
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    arguments = (source, tmp_path / "store", start)
    processes = [context.Process(target=resolve_together, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_failed_conversion_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: Path, target: Path, progress: Progress) -> None:
        (target / "config.json").write_text("{}")
        raise ValueError("architecture foo is not supported\nsecond line")

    source, store = tmp_path / "model.gguf", tmp_path / "store"
    source.write_bytes(b"content")
    monkeypatch.setattr(model_store, "convert_gguf", broken)
    with pytest.raises(ModelError, match=r"Cannot convert .*: architecture foo is not supported$"):
        resolve(str(source), root=store)
    assert [entry.suffix for entry in store.iterdir()] == [".lock"]
    monkeypatch.setattr(model_store, "convert_gguf", fake_conversion)
    assert resolve(str(source), root=store).is_dir()


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store, "convert_gguf", fake_conversion)
    source, store = tmp_path / "model.gguf", tmp_path / "store"
    source.write_bytes(b"content")
    target = resolve(str(source), root=store)
    (store / "conversions").unlink()
    target.rename(store / f".{target.name}-abandoned")
    assert resolve(str(source), root=store) == target
    assert not list(store.glob(".*"))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (OSError("disk full"), "disk full"),
        (OSError(), "from the hub: OSError$"),
    ],
)
def test_hub_failures_are_one_sentence(
    error: Exception, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    with pytest.raises(ModelUnavailable, match=sentence):
        resolve("org/name", root=tmp_path)


def test_a_hub_id_fetches_code_only_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object, object]] = []

    def fetching(
        repo: str, *, revision: object, allow_patterns: object, ignore_patterns: list[str], **_: object
    ) -> str:
        assert "consolidated*" in ignore_patterns
        calls.append((repo, revision, allow_patterns))
        fill(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetching)
    assert resolve("org/name@v1.0", root=tmp_path) == tmp_path
    assert resolve("org/name", root=tmp_path, remote_code=True) == tmp_path
    safe = ["*.safetensors", "*.json", "*.jinja"]
    assert calls == [("org/name", "v1.0", safe), ("org/name", None, [*safe, "*.py"])]


def test_the_download_reports_bytes_and_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reports: list[tuple[str, float]] = []
    bar = model_store._reporting_bar(lambda *report: reports.append(report))
    with bar(total=4, unit="B") as counted, bar(total=2, unit="it") as files:
        counted.update(1)
        files.update(1)
        counted.update(3)
    assert reports == [("downloading", 0.25), ("downloading", 1.0)]
    assert capsys.readouterr().err == ""


def test_the_default_model_is_complete_and_splits_digits(default_model: Path) -> None:
    config = json.loads((default_model / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("llama", "float32")
    assert str(gguf_conversion.VERSION) == default_model.name.rsplit("-", 1)[1]
    tokenizer = Tokenizer.from_file(str(default_model / "tokenizer.json"))
    assert tokenizer.encode("in  1234").tokens == ["in", "ĠĠ", "1", "2", "3", "4"]
    assert resolve("default", progress=no_progress) == default_model


def test_the_pre_tokenizers_name_is_read_from_a_gguf(tmp_path: Path) -> None:
    assert pre_tokenizer_name(model_store._default_gguf()) == "smollm"
    (tmp_path / "without.gguf").write_bytes(b"GGUF")
    assert pre_tokenizer_name(tmp_path / "without.gguf") is None
