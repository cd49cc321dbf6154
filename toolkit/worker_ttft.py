"""Time to the first token of a worker, asked over one `Execute` stream as a gateway does."""

import struct
import time
from collections.abc import Sequence

from headrace.v1.sampling_pb2 import Sampling, Stopping
from headrace.v1.worker_pb2 import ExecuteCommand, ExecuteHello, Start, StartChoice
from headrace.v1.worker_pb2_grpc import WorkerStub
from services.common.channel import Outbox, dial
from toolkit.bench_stack import all_workers
from toolkit.run_directory import RunningStack

PROMPT_TOKENS = 160  # as many as a chat of `chat_load` has


async def worker_ttft_s(stack: RunningStack, requests: int) -> Sequence[float]:
    """Of so many requests of one token, one after the other, on the stack's only worker."""
    worker = (await all_workers(stack, 1))[0]
    commands: Outbox[ExecuteCommand] = Outbox()
    commands.put(ExecuteCommand(hello=ExecuteHello(gateway_id="bench-gateway")))
    times = []
    async with dial(worker.address) as channel:
        outputs = aiter(WorkerStub(channel).Execute(commands))
        for handle in range(1, requests + 1):
            sent_at = time.perf_counter()
            commands.put(ExecuteCommand(starts=[_start(handle)]))
            begun = False
            async for output in outputs:
                if output.started and not begun:
                    begun = True
                    times.append(time.perf_counter() - sent_at)
                if output.ended:
                    break
        commands.close()
    return times


def _start(handle: int) -> Start:
    return Start(
        request_id=f"bench-gateway-{handle}",
        attempt=1,
        prompt_ids=struct.pack(f"<{PROMPT_TOKENS}I", *range(handle + 300, handle + 300 + PROMPT_TOKENS)),
        choices=[StartChoice(handle=handle)],
        sampling=Sampling(temperature=0.0),
        stopping=Stopping(max_tokens=1, ignore_eos=True),
    )
