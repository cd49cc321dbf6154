"""The command line: what is refused before anything starts. What it starts is for the flow tests."""

from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from services.worker.config import WorkerSettings
from tests.certificates import certificate
from tests.toolkit.fake_server import fake_server
from toolkit import up_options
from toolkit.main import app

BAD_OPTIONS = [
    ["--workers", "0"],
    ["--http-port", "70000"],
    ["--kv-blocks", "x"],
    ["--dtype", "foo"],
    ["--quantize", "int3"],
]


def test_help_tells_every_option() -> None:
    told = CliRunner().invoke(app, ["up", "--help"], env={"COLUMNS": "200"}).output
    for option in (
        "--model",
        "--workers",
        "--dtype",
        "--quantize",
        "--kv-blocks",
        "--http-port",
        "--grpc-port",
        "--redis-url",
    ):
        assert option in told


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_usage_errors(options: list[str]) -> None:
    assert CliRunner().invoke(app, ["up", *options]).exit_code == 2


def test_choices_are_those_of_the_worker() -> None:
    fields = WorkerSettings.model_fields
    assert set(up_options.WeightType) == set(get_args(fields["dtype"].annotation))
    assert set(up_options.Quantization) == set(get_args(fields["quantize"].annotation))


# The last one's password is what urllib names as a bad port.
@pytest.mark.parametrize("url", ["foo", "http://:hush@127.0.0.1", "redis://:hush@127.0.0.1:x", "redis://u:hush/@host"])
@pytest.mark.parametrize("command", [["up"], ["keys", "list"], ["queue", "dead", "list"], ["costs"]])
def test_a_redis_url_that_is_none_is_one_sentence_without_its_password(
    command: list[str], url: str, tmp_path: Path
) -> None:
    environment = {"XDG_STATE_HOME": str(tmp_path / "state")}
    runs = [
        CliRunner().invoke(app, [*command, "--redis-url", url], env=environment),
        CliRunner().invoke(app, command, env={**environment, "HEADRACE_REDIS_URL": url}),
    ]
    for run in runs:
        assert (run.exit_code, run.output.count("\n"), "--redis-url" in run.output) == (1, 1, True)
        assert "hush" not in run.output
    assert not (tmp_path / "state").exists()


def test_a_state_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    options = ["--http-port", "0", "--grpc-port", "0"]
    run = CliRunner().invoke(app, ["up", *options], env={"XDG_STATE_HOME": str(tmp_path / "state")})
    assert (run.exit_code, run.output.count("\n")) == (1, 1)
    assert "state/headrace/run (Not a directory): set XDG_STATE_HOME to another" in run.output


def test_ps_without_a_stack_says_how_to_start_one(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["ps"], env={"XDG_STATE_HOME": str(tmp_path)})
    assert (shown.exit_code, shown.output) == (0, "No stack runs here. Start one with: headrace up\n")


def test_help_of_the_benchmark_tells_every_option() -> None:
    told = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).output
    for option in ("--url", "--peer", "NAME=URL[,PID]", "--rows", "--rounds", "--static", "--out", "UP_OPTIONS"):
        assert option in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--peer", "vllm"], "--peer: 'vllm' is not of the form NAME=URL[,PID]"),
        (["--static", "--url", "http://127.0.0.1:9"], "leave out --url"),
        (["--static", "--", "--batching=static"], "leave out --batching"),
        (["--url", "127.0.0.1:9"], "is not a URL without a path"),
        (["--rows", "single,doubel"], "there is no row 'doubel'"),
    ],
)
def test_a_benchmark_that_cannot_be_is_refused(options: list[str], said: str) -> None:
    run = CliRunner().invoke(app, ["bench", *options])
    assert (run.exit_code, said in run.output) == (1, True)


def test_a_benchmark_prints_writes_and_draws(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    with fake_server() as server:
        run = CliRunner().invoke(app, ["bench", "--url", server.url, "--rows", "single", "--out", str(out)])
    assert (run.exit_code, "--url: medians over the rounds" in run.output) == (0, True)
    assert (out.exists(), out.with_suffix(".png").exists()) == (True, True)


def test_short_answers_are_told_loudly_and_fail(tmp_path: Path) -> None:
    with fake_server("--mood", "short") as server:
        options = ["--url", server.url, "--rows", "single", "--out", str(tmp_path / "bench.json")]
        run = CliRunner().invoke(app, ["bench", *options])
    assert run.exit_code == 1
    assert "NOT VALID: --url, row single: 4 answers" in run.output


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"--tls": "nowhere"}, "nowhere/gateway.crt: No such file or directory."),
        ({"--tls": ".", "--tls-cert": "gateway.crt"}, "--tls takes the files of its folder: leave out --tls-cert"),
        ({"--tls-cert": "gateway.crt"}, "--tls-cert and --tls-key belong together: give --tls-key, too."),
        ({"--tls-cert": "nowhere.crt", "--tls-key": "gateway.key"}, "nowhere.crt: No such file or directory."),
        ({"--tls-cert": "gateway.crt", "--tls-key": "ca.key"}, "ca.key is not the key of"),
    ],
)
def test_certificates_that_cannot_be_used_stop_the_start(files: dict[str, str], said: str, tmp_path: Path) -> None:
    certificate(tmp_path)
    options = [word for option, file in files.items() for word in (option, str(tmp_path / file))]
    run = CliRunner().invoke(app, ["up", *options], env={"XDG_STATE_HOME": str(tmp_path / "state")})
    assert (run.exit_code, said in run.output, (tmp_path / "state").exists()) == (1, True, False)
