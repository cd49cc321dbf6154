"""`headrace profile` on a running stack: a worker under load, and a gateway looked at from outside."""

import gzip
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

from tests.flows.headrace_up import HeadraceUp

DECODES = 40


def test_a_worker_under_load(stack: HeadraceUp, client: openai.OpenAI, model: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(
            client.completions.create, model=model, prompt="Once upon a time", max_tokens=400, temperature=0
        )
        said = stack.run(
            "profile", "--worker", "worker", "--steps", str(DECODES), "--traced-steps", "5", "--out", str(tmp_path)
        )
        running.result()
    assert f"worker: {DECODES} steps in " in said
    report = json.loads((tmp_path / "report.json").read_text())
    phases = {phase["name"]: phase for phase in report["phases"]}
    assert int(phases["decode"]["tokens"]) >= DECODES - 1 and phases["decode"]["seconds"] > 0
    assert int(phases["sample"]["tokens"]) >= DECODES, "a step draws one token, and those after it that were drafted"
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("step") == names.count("decode") == names.count("sample") == 5
    assert (tmp_path / "tensorboard/worker.pt.trace.json.gz").exists()
    assert "aten::" in (tmp_path / "operators.txt").read_text()


def test_a_gateway_from_outside(stack: HeadraceUp, client: openai.OpenAI, model: str, tmp_path: Path) -> None:
    path, over = tmp_path / "gateway.svg", threading.Event()

    def keep_busy() -> None:
        while not over.is_set():
            client.completions.create(model=model, prompt="Once upon a time", max_tokens=2)

    with ThreadPoolExecutor(1) as threads:
        busy = threads.submit(keep_busy)
        try:
            said = stack.run("profile", "--service", "gateway", "--seconds", "1", "--out", str(tmp_path))
        finally:
            over.set()
        busy.result()
    assert said.strip() == str(path)
    assert "<svg" in path.read_text()
