"""Prefill and decode on separate workers: the same answers as on one, also when the other side dies, stalls or lies."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from headrace.v1.scheduler_pb2 import WorkerRole
from tests.flows.conftest import WORKER_OPTIONS
from tests.flows.headrace_up import HeadraceUp, eventually

LONG = 600
_PAUSE_S = 0.8  # a source that gives nothing for a second stalls


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cache service keeps on disk."""
    return tmp_path_factory.mktemp("blocks")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, default_model: Path, blocks: Path) -> Iterator[HeadraceUp]:
    """A stack with one prefill and one decode worker."""
    roles = ("--prefill-workers", "1", "--decode-workers", "1", "--cache-disk", str(blocks))
    running = HeadraceUp(tmp_path_factory.mktemp("split"), *WORKER_OPTIONS, *roles)
    try:
        running.wait_ready()
        wait_for_both(running)
        yield running
    finally:
        running.kill()


def wait_for_both(stack: HeadraceUp) -> None:
    eventually(lambda: sum(worker.healthy for worker in stack.fleet().workers) == 2, "the scheduler sees both workers")


def prompt(seed: int, tokens: int) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(300, 40_000) for _ in range(tokens)]


def ask(stack: HeadraceUp, prompt: list[int], max_tokens: int = 8, cache_salt: str = "") -> str:
    """The text of a greedy completion."""
    model = stack.fleet().workers[0].registration.model.name
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    body |= {"cache_salt": cache_salt} if cache_salt else {}
    answer = httpx.post(f"{stack.http_url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def computed(stack: HeadraceUp, worker: str) -> float:
    return stack.metric(worker, "vllm:prompt_tokens_total")


def failures(stack: HeadraceUp, source: str) -> float:
    return stack.metric("decode", "headrace_kv_import_failures_total", source=source)


def prefills(stack: HeadraceUp) -> int:
    """What the prefill worker runs."""
    states = {one.registration.worker_id: one.state for one in stack.fleet().workers}
    return states["prefill"].running_sequences


def assert_nothing_is_held(stack: HeadraceUp) -> None:
    """Every block of every worker is free again."""
    eventually(
        lambda: all(
            worker.state.free_blocks == worker.registration.total_blocks and not worker.state.waiting_sequences
            for worker in stack.fleet().workers
        ),
        "all blocks are free",
    )


@pytest.mark.timeout(600)  # a minute is usual; a busy machine takes many times that
def test_fifty_prompts_give_the_same_answers_as_on_one_worker(split: HeadraceUp, stack: HeadraceUp) -> None:
    lengths = [random.Random(number).randrange(65, 180) for number in range(45)] + [LONG, 512, 513, 400, 333]
    prompts = [prompt(number, length) for number, length in enumerate(lengths)]
    apart = [ask(split, one) for one in prompts]  # several at once: some would be sooner computed by the decoder
    with ThreadPoolExecutor(8) as threads:
        assert apart == list(threads.map(lambda one: ask(stack, one), prompts))
    assert split.metric("scheduler", "headrace_placements_total", reason="prefill") == len(prompts)
    assert split.metric("decode", "headrace_kv_import_failures_total") == 0
    assert computed(split, "decode") <= 16 * len(prompts)
    assert computed(split, "prefill") >= sum(lengths)
    assert_nothing_is_held(split)


def begun_prefill(stack: HeadraceUp, threads: Executor, seed: int) -> tuple[list[int], Future[str]]:
    """A prompt that the prefill worker computes now, and its answer to come. One that was too quick has a successor."""
    for number in range(seed, seed + 20):
        long = prompt(number, LONG)
        answer = threads.submit(ask, stack, long)

        def seen_or_over(answer: Future[str] = answer) -> bool:
            return prefills(stack) > 0 or answer.done()

        eventually(seen_or_over, "the prefill has begun")
        if not answer.done():
            return long, answer
    raise AssertionError("no prefill was seen while it ran")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_prefill_worker_that_dies_or_stands_still_is_a_pause(
    split: HeadraceUp, stack: HeadraceUp, number: signal.Signals
) -> None:
    wait_for_both(split)
    before = failures(split, "prefill")
    pid = split.pid_of("prefill")
    since = split.lines_so_far
    with ThreadPoolExecutor(1) as threads:
        long, answer = begun_prefill(split, threads, seed=1000 * int(number))
        os.kill(pid, number)
        assert answer.result() == ask(stack, long)
    assert failures(split, "prefill") == before + 1
    if number == signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)
    else:
        split.wait_for_line(r"^prefill +ready on", since=since, timeout_s=120)
    wait_for_both(split)
    assert_nothing_is_held(split)


def test_a_client_that_leaves_frees_both_sides(split: HeadraceUp) -> None:
    model = split.fleet().workers[0].registration.model.name
    body = {"model": model, "prompt": prompt(2007, 1500), "max_tokens": 50, "stream": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{split.http_url}/v1/completions", json=body, timeout=httpx.Timeout(60, read=1.0))
    assert_nothing_is_held(split)


def test_kept_blocks_outlive_every_worker_and_the_cache_service(split: HeadraceUp, blocks: Path) -> None:
    long = prompt(2008, LONG)
    text = ask(split, long)
    eventually(lambda: len(list(blocks.rglob("*.kvblock"))) >= LONG // 16 - 1, "the prompt is on disk")
    for name in ("prefill", "decode", "cache"):
        split.kill_member(name)
    wait_for_both(split)
    eventually(lambda: split.metric("scheduler", "headrace_index_blocks") > 0, "the scheduler knows of the blocks")
    assert ask(split, long) == text
    assert split.metric("decode", "headrace_kv_imported_blocks_total", source="cache") >= LONG // 16 - 1
    assert computed(split, "decode") <= 16


def test_corrupt_bytes_cost_time_and_no_token(split: HeadraceUp, blocks: Path) -> None:
    long = prompt(2009, LONG)
    before = set(blocks.rglob("*.kvblock"))
    text = ask(split, long)
    eventually(lambda: len(set(blocks.rglob("*.kvblock")) - before) >= LONG // 16 - 1, "the prompt is on disk")
    for file in set(blocks.rglob("*.kvblock")) - before:
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
    for name in ("prefill", "decode", "cache"):
        split.kill_member(name)
    wait_for_both(split)
    eventually(lambda: split.metric("scheduler", "headrace_index_blocks") > 0, "the scheduler knows of the blocks")
    assert ask(split, long) == text
    assert failures(split, "cache") == 1
    assert split.metric("cache", "headrace_cache_dropped_total", reason="digest") >= 1
    assert_nothing_is_held(split)


@contextmanager
def slowed(pid: int, *, runs_s: float) -> Iterator[None]:
    """The process stands still but for `runs_s` at a time, with pauses that are just no stall; 0: all the time."""
    over = threading.Event()

    def pulse() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            over.wait(_PAUSE_S)
            if runs_s:
                os.kill(pid, signal.SIGCONT)
                until = time.perf_counter() + runs_s
                while time.perf_counter() < until:
                    pass  # who sleeps here may oversleep on a busy machine, while all is sent

    with ThreadPoolExecutor(1) as threads:
        pulsing = threads.submit(pulse)
        try:
            yield
        finally:
            over.set()
            pulsing.result()
            os.kill(pid, signal.SIGCONT)


@pytest.mark.timeout(600)  # a quarter of a minute is usual; a busy machine takes many times that
def test_a_cache_service_that_stands_still_or_is_slow_is_a_pause(split: HeadraceUp, blocks: Path) -> None:
    # It stands still last: those who watch it then lose their connection, and for a moment what they know.
    prompts = {runs_s: prompt(2011 + number, LONG) for number, runs_s in enumerate((0.002, 0.0))}
    before = len(list(blocks.rglob("*.kvblock")))
    texts = {runs_s: ask(split, long) for runs_s, long in prompts.items()}
    kept = 2 * (LONG // 16 - 1)
    eventually(lambda: len(list(blocks.rglob("*.kvblock"))) >= before + kept, "the prompts are on disk")
    for name in ("prefill", "decode"):
        split.kill_member(name)
    wait_for_both(split)
    for number, (runs_s, long) in enumerate(prompts.items(), 1):
        eventually(lambda: split.metric("scheduler", "headrace_index_blocks") >= kept, "the scheduler knows the blocks")
        with slowed(split.pid_of("cache"), runs_s=runs_s):
            assert ask(split, long) == texts[runs_s]
        told = split.metric("decode", "headrace_kv_import_failures_total", source="cache", reason="slow")
        assert told == number, Path(split.member("decode").log).read_text()[-2000:]
    assert_nothing_is_held(split)


def test_tenants_of_different_salts_share_nothing(split: HeadraceUp) -> None:
    wait_for_both(split)
    long = prompt(2010, LONG)

    def computed_by_all() -> float:
        return computed(split, "decode") + computed(split, "prefill")

    begin = computed_by_all()
    text = ask(split, long, cache_salt="one")
    first = computed_by_all() - begin
    assert ask(split, long, cache_salt="one") == text
    assert computed_by_all() - begin - first <= 16, "the same tenant finds it again"
    again = computed_by_all()
    assert ask(split, long, cache_salt="two") == text
    assert computed_by_all() - again == first >= LONG


def test_a_role_can_change_while_the_stack_runs(split: HeadraceUp) -> None:
    wait_for_both(split)

    def role_of(worker: str) -> str:
        states = {one.registration.worker_id: one.state.role for one in split.fleet().workers}
        return WorkerRole.Name(states[worker])

    split.run("role", "decode", "both")
    eventually(lambda: role_of("decode") == "WORKER_ROLE_BOTH", "the worker has changed")
    split.run("role", "decode", "decode")
    eventually(lambda: role_of("decode") == "WORKER_ROLE_DECODE", "the worker has changed back")
