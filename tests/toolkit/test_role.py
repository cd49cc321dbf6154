import pytest

from toolkit.role import RoleNotSet, set_role


async def test_a_worker_that_no_stack_has() -> None:
    with pytest.raises(RoleNotSet, match="No stack that runs here has a worker 'w9'"):
        await set_role([], "w9", "prefill")
