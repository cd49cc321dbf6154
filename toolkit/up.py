"""`headrace up`: a whole stack on this machine, from its start to its drained stop."""

import asyncio
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Coroutine
from functools import partial
from pathlib import Path

import psutil
from rich.console import Console

from headrace.v1.scheduler_pb2 import DescribeFleetRequest
from headrace.v1.scheduler_pb2_grpc import SchedulerStub
from services.common.channel import cancel_and_wait, dial, dial_front
from services.common.config import child_environment
from services.common.tls import FrontCert, TlsFiles
from toolkit.health import grpc_serves, http_needs_key, http_ready, redis_answers
from toolkit.process import Probe, ProcessSpec
from toolkit.redis_server import find_redis_server, redis_command
from toolkit.run_directory import RunDirectory, RunningProcess, RunningStack
from toolkit.screen import Screen, open_screen
from toolkit.stack import Member, Stack
from toolkit.supervisor import Supervisor

_REDRAW_EVERY_S = 0.25
# Longer than the services give their running requests to finish, so that a kill is the exception.
_STOP_GRACE_S = 60.0
# For the scheduler's fleet, just after a start that kept every core busy.
_FIRST_ANSWER_S = 30.0
_ASK_AGAIN_S = 0.2


async def run_stack(stack: Stack, tls: TlsFiles | None, directory: RunDirectory, console: Console) -> None:
    """Runs a stack until SIGINT, SIGTERM or SIGHUP; a second signal kills it. Raises ProcessFailed.

    `tls`: what this process shows to the services, as its context has it, and other commands are to show.
    """
    screen = open_screen(console)

    def on_change() -> None:
        screen.draw(supervisor.processes)
        directory.write_state(_describe(stack, tls, directory, supervisor))

    supervisor = Supervisor(on_change)
    stop_asked = _stop_on_signals(supervisor)
    redrawing = asyncio.create_task(_redraw(screen, supervisor))
    try:
        await _first_to_end(_serve(stack, directory, supervisor, console), supervisor.wait_failed(), stop_asked.wait())
    finally:
        for process in await supervisor.stop():
            console.print(f"{process.spec.name} did not stop within {_STOP_GRACE_S:.0f} s and was killed.")
        await cancel_and_wait([redrawing])
        screen.close()


async def _serve(stack: Stack, directory: RunDirectory, supervisor: Supervisor, console: Console) -> None:
    """Starts everything, tells when it is ready, and stays."""
    for tier in stack.tiers:
        supervisor.start([_process_spec(member, directory, stack.front_cert) for member in tier])
        if tier[0].service == "redis":  # the others would only retry
            await supervisor.wait_ready()
    await supervisor.wait_ready()
    model = await served_model(stack.scheduler_address)
    took_s = time.time() - psutil.Process().create_time()
    needs_key = await http_needs_key(f"{stack.http_urls[0]}/v1/models")
    told = welcome(stack, model, took_s, directory.path, needs_key=needs_key)
    console.print(told, markup=False, soft_wrap=True)
    await asyncio.Event().wait()


async def _redraw(screen: Screen, supervisor: Supervisor) -> None:
    while True:
        screen.draw(supervisor.processes)
        await asyncio.sleep(_REDRAW_EVERY_S)


async def _first_to_end(*alternatives: Coroutine[object, object, object]) -> None:
    """Runs all until one ends; raises what it raised."""
    tasks = [asyncio.create_task(alternative) for alternative in alternatives]
    ended, running = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await cancel_and_wait(running)
    for task in ended:
        task.result()


def _stop_on_signals(supervisor: Supervisor) -> asyncio.Event:
    """Set by the first signal; the second one kills everything, which lets the stop under way end."""
    stop_asked = asyncio.Event()

    def on_signal() -> None:
        if stop_asked.is_set():
            supervisor.kill()
        stop_asked.set()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop_asked


def _process_spec(member: Member, directory: RunDirectory, front_cert: FrontCert | None) -> ProcessSpec:
    if member.service == "redis":
        host, _, port = member.address.rpartition(":")
        command = redis_command(find_redis_server(), int(port), directory.data_path("redis"))
        probe: Probe = partial(redis_answers, host, int(port))
    else:
        # -P: a folder named `services` where the command is typed must not be taken for ours.
        command = (sys.executable, "-P", "-m", f"services.{member.service}")
        probe = partial(_is_ready, member, front_cert)
    return ProcessSpec(
        name=member.name,
        address=member.address,
        command=command,
        environment={**member.environment, **child_environment(member.service, member.settings)},
        log_path=directory.log_path(member.name),
        probe=probe,
        stop_grace_s=_STOP_GRACE_S,
    )


async def _is_ready(member: Member, front_cert: FrontCert | None) -> bool:
    if member.ready_url is None:
        return await grpc_serves(dial(member.address))
    return await grpc_serves(dial_front(member.address, front_cert)) and await http_ready(member.ready_url)


async def served_model(scheduler_address: str) -> str:
    """Of the scheduler, since a gateway may need a key. Another scheduler may know a worker sooner."""
    async with dial(scheduler_address) as channel:
        while True:
            reply = await SchedulerStub(channel).DescribeFleet(DescribeFleetRequest(), timeout=_FIRST_ANSWER_S)
            if reply.workers:
                return reply.workers[0].registration.model.name
            await asyncio.sleep(_ASK_AGAIN_S)


def welcome(stack: Stack, model: str, took_s: float, directory: Path, *, needs_key: bool = False) -> str:
    """What a person is told when the stack is ready, so many seconds after this process began."""
    question = {"role": "user", "content": "What is the capital of France?"}
    body = json.dumps({"model": model, "stream": True, "temperature": 0, "messages": [question]})
    http_url, *others = stack.http_urls
    more = f"    more gateways {' '.join(others)}" if others else ""
    key = " -H 'authorization: Bearer KEY'" if needs_key else ""
    make_key = "headrace keys create NAME" + (" makes the KEY that callers need here" if needs_key else "")
    is_private = any(member.service == "redis" for member in stack.members)
    ending = "keys, budgets and costs end with this run's own Redis: --redis-url keeps them in yours\n"
    return f"""
{model} is ready after {took_s:.1f} s. Ask it something:

  {_curl(stack)}/v1/chat/completions{key} -H 'content-type: application/json' -d {shlex.quote(body)}

playground {http_url}/    OpenAI API {http_url}/v1    gRPC {stack.grpc_address}    metrics {http_url}/metrics{more}
logs {directory}    what runs: headrace ps    API keys: {make_key}    stop: Ctrl-C
{ending if is_private else ""}"""


def _curl(stack: Stack) -> str:
    """Of the first gateway, trusting its CA where that is at hand. Where its certificate is not for this machine, curl
    connects here under a name that it is for.
    """
    if stack.front_cert is None:
        return f"curl -N {stack.http_urls[0]}"
    host, _, port = stack.http_urls[0].removeprefix("https://").rpartition(":")
    name = stack.front_cert.name
    elsewhere = "" if name == host else f" --connect-to ::{host}:{port}"
    # Every start would wait for this import, and few need it.
    from toolkit.certificates import issuer_beside

    path = Path(stack.front_cert.path)
    return f"curl -N --cacert {shlex.quote(str(issuer_beside(path) or path))}{elsewhere} https://{name}:{port}"


def _describe(stack: Stack, tls: TlsFiles | None, directory: RunDirectory, supervisor: Supervisor) -> RunningStack:
    members = {member.name: member for member in stack.members}
    return RunningStack(
        pid=os.getpid(),
        directory=str(directory.path),
        http_url=stack.http_urls[0],
        grpc_address=stack.grpc_address,
        scheduler_address=stack.scheduler_address,
        redis_url=stack.redis_url,
        front_cert=stack.front_cert,
        tls=tls,
        processes=tuple(
            RunningProcess(
                name=process.spec.name,
                service=members[process.spec.name].service,
                address=process.spec.address,
                metrics_url=members[process.spec.name].metrics_url,
                log=str(process.spec.log_path),
                state=process.state.value,
                pid=process.pid,
                started_unix_s=process.started_unix_s,
            )
            for process in supervisor.processes
        ),
    )
