"""A few cells of `make chaos`: callers of a loaded stack get every answer while one of its processes is struck."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.chaos.callers import Callers
from tests.chaos.cells import OPTIONS, measure, start
from tests.flows.headrace_up import HeadraceUp

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, default_model: object) -> Iterator[tuple[HeadraceUp, Callers]]:
    stack = HeadraceUp(tmp_path_factory.mktemp("chaos"), *OPTIONS)
    try:
        yield stack, start(stack)
    finally:
        stack.kill()


@pytest.mark.parametrize(
    ("member", "fault"),
    [
        ("decode worker", "SIGKILL"),
        ("gateway", "SIGTERM"),
        ("gateway, resumable", "SIGKILL"),
        ("Redis", "SIGSTOP"),
    ],
)
def test_callers_get_every_answer(loaded: tuple[HeadraceUp, Callers], member: str, fault: str) -> None:
    cell = asyncio.run(measure(*loaded, member, fault, stopped_s=3.0))
    assert not cell.failures, (cell.failures, cell.seen.notes)
