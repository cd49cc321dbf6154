"""The command line: what is refused before anything starts. What it starts is for the flow tests."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from toolkit.main import app


def test_help_tells_every_option() -> None:
    told = CliRunner().invoke(app, ["up", "--help"], env={"COLUMNS": "200"}).output
    for option in ("--model", "--workers", "--dtype", "--kv-blocks", "--http-port", "--grpc-port", "--redis-url"):
        assert option in told


@pytest.mark.parametrize("options", [["--workers", "0"], ["--http-port", "70000"], ["--kv-blocks", "x"]])
def test_bad_options_are_usage_errors(options: list[str]) -> None:
    assert CliRunner().invoke(app, ["up", *options]).exit_code == 2


def test_ps_without_a_stack_says_how_to_start_one(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["ps"], env={"XDG_STATE_HOME": str(tmp_path)})
    assert (shown.exit_code, shown.output) == (0, "No stack runs here. Start one with: headrace up\n")
