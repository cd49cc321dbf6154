"""Files that change while they are in use."""

from pathlib import Path

import pytest

from services.common.config import ConfigError
from services.common.renewal import Renewed


def number_in(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"no number: {error}") from None


def test_a_file_is_read_again_when_it_has_changed_and_only_then(tmp_path: Path) -> None:
    path, reads = tmp_path / "number", []
    path.write_text("1")

    def read() -> int:
        reads.append(number_in(path))
        return reads[-1]

    number = Renewed([path], read)
    assert (number.get(), number.get(), reads) == (1, 1, [1])
    path.write_text("22")
    assert (number.get(), number.get(), reads) == (22, 22, [1, 22])


def test_what_cannot_be_used_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "number"
    path.write_text("1")
    number = Renewed([path], lambda: number_in(path))
    path.write_text("none")
    assert number.get() == number.get() == 1
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1, "told once"
    path.unlink()
    assert number.get() == 1
    path.write_text("333")
    assert number.get() == 333


def test_files_that_are_bad_from_the_start_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Renewed([tmp_path / "number"], lambda: number_in(tmp_path / "number"))
