import json
import subprocess
import sys
from pathlib import Path

import pytest

from services.worker import pull


def run_pull(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.worker.pull", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_folder_is_printed(default_model: Path) -> None:
    assert run_pull("default").stdout.strip() == str(default_model)
    last = run_pull("default", "--json").stdout.splitlines()[-1]
    assert json.loads(last) == {"path": str(default_model)}


def test_the_store_is_the_argument_or_else_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots: list[Path | None] = []

    def resolving(_name: str, *, root: Path | None, **_: object) -> Path:
        roots.append(root)
        return tmp_path

    monkeypatch.setattr(pull, "resolve", resolving)
    monkeypatch.setenv("HEADRACE_WORKER_STORE", "/set")
    for arguments in ([], ["--store", "/given"]):
        monkeypatch.setattr(sys, "argv", ["pull", "default", *arguments])
        assert pull.main() == 0
    assert roots == [Path("/set"), Path("/given")]


def test_failure_is_one_sentence_and_status_1(tmp_path: Path) -> None:
    plain = run_pull("nonsense", "--store", str(tmp_path))
    assert (plain.returncode, plain.stdout) == (1, "")
    assert plain.stderr.startswith("No model 'nonsense'")
    as_json = run_pull("nonsense", "--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["error"].startswith("No model 'nonsense'")


def test_progress_is_a_line_per_stage_or_a_json_object_per_report(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (False, True):
        with pull._reporter(as_json) as report:
            report("reading", 0.0)
            report("reading", 0.25)
            report("writing", 0.9)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["  0%  reading", " 90%  writing"]
    assert json.loads(captured.out.splitlines()[1]) == {"stage": "reading", "fraction": 0.25}


def test_the_bar_runs_to_its_end() -> None:
    with pull._Bar() as report:
        report("reading", 0.5)
        report("done", 1.0)
