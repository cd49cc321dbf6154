import pytest

from toolkit.directives import NotTold, drain, set_role


async def test_a_worker_that_no_stack_has() -> None:
    with pytest.raises(NotTold, match="No stack that runs here has a worker 'w9'"):
        await set_role([], "w9", "prefill")
    with pytest.raises(NotTold, match="No stack that runs here has a worker 'w9'"):
        await drain([], "w9", undo=False)
