"""The worker as a process: starts with a tiny model, serves, and ends as it should."""

import asyncio
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import pytest

from headrace.v1 import sampling_pb2, worker_pb2, worker_pb2_grpc
from services.common.channel import Outbox, dial
from tests.services.worker.engine.tiny_models import save_tiny, save_tokenizer

READY = re.compile(r"ready on (127\.0\.0\.1:\d+): (\S+)")


def write_tiny_model(folder: Path) -> None:
    save_tiny(
        folder,
        "LlamaConfig",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
    )
    save_tokenizer(folder)


async def start_worker(**settings: object) -> Process:
    given = {"port": 0, "metrics_port": 0, "threads": 1, "kv_blocks": 16, **settings}
    environment = {f"HEADRACE_WORKER_{name.upper()}": str(value) for name, value in given.items()}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.worker",
        stderr=PIPE,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")},
            **environment,
            "HEADRACE_SCHEDULERS": "127.0.0.1:1",
            "HEADRACE_CACHES": "127.0.0.1:1",
        },
    )


async def read_until_ready(process: Process) -> tuple[list[str], re.Match[str]]:
    assert process.stderr is not None
    lines: list[str] = []
    async for raw in process.stderr:
        lines.append(raw.decode())
        if found := READY.search(lines[-1]):
            return lines, found
    raise AssertionError("the worker ended:\n" + "".join(lines))


async def test_a_worker_starts_answers_and_drains_on_sigterm(tmp_path: Path) -> None:
    model = tmp_path / "tiny-llama"
    write_tiny_model(model)
    process = await start_worker(model=model)
    try:
        lines, ready = await read_until_ready(process)
        assert [stage for stage in ("loading", "warming up") if any(stage in line for line in lines)]
        assert ready[2] == "tiny-llama"
        async with dial(ready[1]) as channel:
            commands: Outbox[worker_pb2.ExecuteCommand] = Outbox()
            call = worker_pb2_grpc.WorkerStub(channel).Execute(commands)
            commands.put(worker_pb2.ExecuteCommand(hello=worker_pb2.ExecuteHello(gateway_id="g")))
            start = worker_pb2.Start(
                request_id="r",
                prompt_ids=bytes([3, 0, 0, 0, 4, 0, 0, 0]),
                choices=[worker_pb2.StartChoice(handle=1)],
                stopping=sampling_pb2.Stopping(max_tokens=5, ignore_eos=True),
            )
            commands.put(worker_pb2.ExecuteCommand(starts=[start]))
            tokens: list[int] = []
            while len(tokens) < 5:
                output = await call.read()
                assert isinstance(output, worker_pb2.StepOutput)
                tokens += output.token_ids
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize(
    ("settings", "status", "sentence"),
    [
        ({"model": "no such model"}, 2, "cannot start: No model 'no such model'"),
        ({"max_sequences": "many"}, 2, "HEADRACE_WORKER_MAX_SEQUENCES"),
        ({"max_sequences": 64, "max_batch_tokens": 8}, 2, "max_batch_tokens 8 must be at least max_sequences 64"),
    ],
)
async def test_what_cannot_start_says_why_in_one_sentence(
    settings: dict[str, object], status: int, sentence: str
) -> None:
    process = await start_worker(**settings)
    _, errors = await process.communicate()
    assert process.returncode == status
    assert sentence in errors.decode()
    assert "Traceback" not in errors.decode()


async def test_deterministic_is_refused_where_it_cannot_hold(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    process = await start_worker(model=tmp_path, implementation="native", deterministic="true")
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert "deterministic needs the compiled implementation" in errors.decode() and "Traceback" not in errors.decode()


async def test_a_pool_too_small_for_one_sequence_refuses_to_start(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    process = await start_worker(model=tmp_path, kv_blocks=2)
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert "needs 4 KV blocks" in errors.decode() and "Traceback" not in errors.decode()
