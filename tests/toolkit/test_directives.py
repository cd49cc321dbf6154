import pytest

from services.common.tls import TlsFiles
from toolkit.directives import NotTold, drain, set_role
from toolkit.run_directory import RunningProcess, RunningStack


async def test_a_worker_that_no_stack_has() -> None:
    with pytest.raises(NotTold, match="No stack that runs here has a worker 'w9'"):
        await set_role([], "w9", "prefill")
    with pytest.raises(NotTold, match="No stack that runs here has a worker 'w9'"):
        await drain([], "w9", undo=False)


async def test_certificates_that_are_gone() -> None:
    worker = RunningProcess("w1", "worker", "127.0.0.1:1", None, "", "ready", 1, 0.0)
    gone = TlsFiles("/nowhere/ca.crt", "/nowhere/headrace.crt", "/nowhere/headrace.key")
    stack = RunningStack(1, "logs", "http://h:1", "h:2", "127.0.0.1:3", "", (worker,), tls=gone)
    with pytest.raises(NotTold, match=r"The stack's certificates cannot be used: cannot read /nowhere/ca\.crt"):
        await drain([stack], "w1", undo=False)
