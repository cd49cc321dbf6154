"""The worker that runs a deterministic request is killed at a token, and the answer is the undisturbed one.

A gate holds the worker: it has computed exactly so many tokens, and the client has them, when it is killed. `make
chaos` does so at every index of the tiny model's answer; `make test` at some.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from headrace.v1.inference_pb2 import GenerateRequest, TokenIds
from headrace.v1.sampling_pb2 import Sampling, Stopping
from tests.flows.kills.gate import DEADLY_TOKEN
from tests.flows.kills.gated_stack import GatedStack
from tests.flows.kills.reading import Answer, Reading
from tests.redis_server import RedisServer
from tests.services.worker.engine.tiny_models import VOCABULARY, save_tiny, save_tokenizer

TOKENS = 48
EVERY_INDEX = bool(os.environ.get("HEADRACE_TEST_EVERY_INDEX"))
SOME = (0, 1, 16, 31, 47)
DISAGGREGATED = ("prefill", "decode", "decode")
TWELVE = (0, 1, 2, 5, 9, 15, 16, 17, 24, 33, 40, 47)
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"sampling": Sampling(temperature=0.0)},
    "sampled": {"sampling": Sampling(temperature=1.0, top_p=0.9, seed=7)},
    "penalties": {
        "sampling": Sampling(
            temperature=0.9, seed=3, frequency_penalty=0.5, presence_penalty=0.3, repetition_penalty=1.2
        )
    },
    "stop": {"sampling": Sampling(temperature=1.0, seed=7)},
    "two choices": {"sampling": Sampling(temperature=1.0, seed=5), "n": 2},
}

pytestmark = pytest.mark.timeout(1800 if EVERY_INDEX else 400)


class Killing:
    """A stack, the requests that are disturbed on it, and their undisturbed answers."""

    def __init__(self, stack: GatedStack, workers: int, model: str, prompt: list[int]) -> None:
        self._stack = stack
        self._workers = workers
        self._model = model
        self._prompt = prompt
        self._undisturbed: dict[str, tuple[GenerateRequest, Answer]] = {}

    def undisturbed(self, mode: str) -> tuple[GenerateRequest, Answer]:
        """The mode's request, and its answer."""
        if mode not in self._undisturbed:
            request = self._request(mode)
            if mode == "stop":  # at its end, so that every index is before it
                words = self._read(request).rest().text[0].split(" ")
                request.stopping.stop.append(" ".join(words[-2:]))
            self._undisturbed[mode] = request, self._read(request).rest()
        return self._undisturbed[mode]

    def kill_at(self, mode: str, index: int) -> None:
        """Kills the worker that runs the request when it has computed so many tokens."""
        stack = self._stack
        request, expected = self.undisturbed(mode)
        index = min(index, TOKENS - len(expected.tokens))  # a step computes a token of each choice
        if index % 2:  # else its prefix is in pools already
            request = GenerateRequest(cache_salt=f"{mode} {index}")
            request.MergeFrom(self.undisturbed(mode)[0])
        stack.until_sequences(0)  # else the one before is taken for this one
        resumed, before = stack.resumes("lost"), stack.tokens()
        stack.hold(index)
        reading = self._read(request)
        reading.until(index)
        running = stack.who_decodes(before, index)
        computed = running.gate.tokens - before[running.name]
        reading.until(computed)
        stack.kill(running)
        stack.fork_worker(running.role)
        stack.open()
        assert reading.rest() == expected
        assert stack.resumes("lost") - resumed == 1
        others = sum(
            worker.gate.tokens - before.get(name, 0)
            for name, worker in stack.workers.items()
            if worker.role != "prefill"
        )
        if mode == "stop":  # the worker may be ahead of its gateway, which finds the end
            assert computed + others >= expected.completion_tokens
        else:
            assert computed + others == TOKENS, "attempt 2 starts at the killed position"
        stack.until_ready(self._workers)

    def send_deadly_prompt(self) -> None:
        """Among others, a prompt of which every worker dies: it ends in an error after three, and the others do not."""
        stack = self._stack
        request, expected = self.undisturbed("sampled")
        deadly = self._request("greedy")
        deadly.token_ids.ids[:] = [5, DEADLY_TOKEN, 7]
        stack.hold(2)  # so that all are there when it comes
        others = [self._read(request) for _ in range(4)]
        stack.until_sequences(4)
        dying = self._read(deadly)
        stack.until_sequences(5)
        stack.open()
        with ThreadPoolExecutor(1) as pool:
            ending = pool.submit(dying.rest)
            while not ending.done():
                stack.replace_the_dead()
                wait([ending], timeout=0.1)
        error = ending.exception()
        assert isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.INTERNAL
        assert "failed on 3 workers" in error.details()
        assert [reading.rest() for reading in others] == [expected] * 4
        stack.replace_the_dead()
        stack.until_ready(self._workers)

    def _request(self, mode: str) -> GenerateRequest:
        stopping = Stopping(max_tokens=TOKENS // MODES[mode].get("n", 1), ignore_eos=True)
        token_ids = TokenIds(ids=self._prompt)
        return GenerateRequest(
            model=self._model, token_ids=token_ids, stopping=stopping, deterministic=True, **MODES[mode]
        )

    def _read(self, request: GenerateRequest) -> Reading:
        return Reading(self._stack.grpc_address, request)


@contextmanager
def killing(
    folder: Path,
    redis: RedisServer,
    database: int,
    roles: Sequence[str],
    name: str,
    prompt: list[int],
    **settings: object,
) -> Iterator[Killing]:
    """Workers of these roles, ready."""
    url = redis.url.removesuffix("/0") + f"/{database}"  # stacks on one database would share their queues
    stack = GatedStack(folder, url, {"threads": 1, "deterministic": True, **settings})
    try:
        first = stack.fork_worker(roles[0])
        stack.until_ready(1)  # it has compiled the kernels for all
        for role in roles[1:]:
            stack.fork_worker(role)
        stack.until_ready(len(roles))
        yield Killing(stack, len(roles), name, prompt)
        assert first.role != "prefill" or first.gate.tokens > 0, "it computed prompts"
    finally:
        stack.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, tiny_store: Path) -> Iterator[Killing]:
    """Three workers of a tiny random model."""
    folder = tmp_path_factory.mktemp("tiny")
    _write_tiny(folder / "tiny")
    prompt = [(11 * position) % VOCABULARY for position in range(40)]
    settings = {"model": folder / "tiny", "store": tiny_store, "kv_blocks": 128}
    with killing(folder, redis_server, 1, ("both",) * 3, "tiny", prompt, **settings) as it:
        yield it


@pytest.fixture(scope="module")
def tiny_disaggregated(
    tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, tiny_store: Path
) -> Iterator[Killing]:
    """The tiny model on a worker that prefills and two that decode."""
    folder = tmp_path_factory.mktemp("tiny-disaggregated")
    _write_tiny(folder / "tiny")
    prompt = [(11 * position) % VOCABULARY for position in range(160)]
    settings = {"model": folder / "tiny", "store": tiny_store, "kv_blocks": 128}
    with killing(folder, redis_server, 2, DISAGGREGATED, "tiny", prompt, **settings) as it:
        yield it


@pytest.fixture(scope="module")
def disaggregated(
    tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, default_model: Path
) -> Iterator[Killing]:
    """The default model on a worker that prefills and two that decode."""
    folder, prompt = tmp_path_factory.mktemp("disaggregated"), list(range(1000, 1160))
    settings = {"dtype": "float32", "kv_blocks": 640}
    with killing(folder, redis_server, 3, DISAGGREGATED, "SmolLM2-135M-Instruct", prompt, **settings) as it:
        yield it


def test_a_prompt_that_kills_its_workers_takes_nobody_along(tiny: Killing) -> None:
    tiny.send_deadly_prompt()


@pytest.mark.parametrize("index", range(TOKENS) if EVERY_INDEX else SOME)
@pytest.mark.parametrize("mode", MODES)
def test_a_killed_worker_changes_no_token(tiny: Killing, mode: str, index: int) -> None:
    tiny.kill_at(mode, index)


@pytest.mark.parametrize("index", range(TOKENS) if EVERY_INDEX else (1,))
@pytest.mark.parametrize("mode", MODES if EVERY_INDEX else ("penalties",))
def test_a_killed_decoder_changes_no_token(tiny_disaggregated: Killing, mode: str, index: int) -> None:
    tiny_disaggregated.kill_at(mode, index)


@pytest.mark.parametrize(
    ("mode", "index"),
    list(zip(MODES, SOME, strict=True)) if not EVERY_INDEX else [(mode, index) for mode in MODES for index in TWELVE],
)
def test_a_killed_decoder_of_the_default_model_changes_no_token(disaggregated: Killing, mode: str, index: int) -> None:
    disaggregated.kill_at(mode, index)


def _write_tiny(folder: Path) -> None:
    save_tiny(
        folder,
        "LlamaConfig",
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        eos_token_id=0,
    )
    save_tokenizer(folder)
