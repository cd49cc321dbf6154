"""What a caller sees of the cluster."""

import asyncio

import msgspec

from headrace.v1.scheduler_pb2 import (
    WORKER_ROLE_BOTH,
    WORKER_ROLE_DECODE,
    Credits,
    DescribeFleetResponse,
    FleetWorker,
    ModelInfo,
    Registration,
    WorkerState,
)
from services.gateway.cluster import Sighting
from services.gateway.http.cluster_api import ClusterObject, GatewayObject, QueueObject, cluster_object
from services.gateway.keys.account import Account
from tests.services.gateway.fakes import MODEL
from tests.services.gateway.keys_for_tests import make_key
from tests.services.gateway.stack import Stack, eventually


def seen(
    worker_id: str,
    *,
    condition: FleetWorker.Condition.ValueType = FleetWorker.CONDITION_HEALTHY,
    model: str = MODEL,
    step: int = 1,
) -> FleetWorker:
    registration = Registration(
        worker_id=worker_id,
        incarnation="1",
        model=ModelInfo(name=model),
        role=WORKER_ROLE_BOTH,
        max_sequences=8,
        total_blocks=100,
        block_bytes=1024,
    )
    state = WorkerState(
        step=step,
        running_sequences=step,
        waiting_sequences=1,
        free_blocks=100 - step,
        credits=Credits(sequences=2, blocks=20, prefill_tokens=200),
        role=WORKER_ROLE_DECODE,
        prefix_queried_tokens=64,
        prefix_hit_tokens=48,
    )
    return FleetWorker(registration=registration, state=state, condition=condition)


def told(*fleets: DescribeFleetResponse) -> ClusterObject:
    return cluster_object(Sighting(fleets, {}), GatewayObject("g", 0), Account())


def test_a_worker_of_two_schedulers_is_one_with_the_newest_state_the_worse_condition_and_all_credits() -> None:
    first = DescribeFleetResponse(scheduler_id="a", workers=[seen("w0", step=3)])
    second = DescribeFleetResponse(
        scheduler_id="b", workers=[seen("w0", step=4, condition=FleetWorker.CONDITION_BREAKER_OPEN)]
    )
    cluster = told(first, second)
    (worker,) = cluster.workers
    assert [scheduler.id for scheduler in cluster.schedulers] == ["a", "b"]
    assert (worker.role, worker.state) == ("decode", "breaker_open")
    assert (worker.running, worker.waiting, worker.max_sequences) == (4, 1, 8)
    assert (worker.kv_blocks_used, worker.kv_blocks_total, worker.kv_block_bytes) == (4, 100, 1024)
    assert (worker.prefix_hit_tokens, worker.prefix_queried_tokens) == (48, 64)
    assert (worker.credits.sequences, worker.credits.blocks, worker.credits.prefill_tokens) == (4, 40, 400)


def test_a_worker_that_has_not_reported_holds_nothing() -> None:
    registered = seen("w0", condition=FleetWorker.CONDITION_SILENT)
    registered.ClearField("state")
    (worker,) = told(DescribeFleetResponse(workers=[registered])).workers
    assert (worker.kv_blocks_used, worker.running, worker.role, worker.state) == (0, 0, "both", "silent")


async def test_the_route_tells_of_workers_queues_and_this_gateway(stack: Stack) -> None:
    stack.scheduler.fleet.workers.append(seen("w0"))
    stack.scheduler.go.clear()
    waiting = asyncio.create_task(stack.complete(priority="low"))
    await stack.scheduler.popped.wait()  # and the job is held there: no gateway runs it
    answer = await stack.http.get("/v1/cluster")
    assert answer.headers["cache-control"] == "no-store"
    cluster = msgspec.json.decode(answer.content, type=ClusterObject)
    assert cluster.gateway.active_requests == 1
    assert [(model.id, model.queue) for model in cluster.models] == [(MODEL, QueueObject(high=0, normal=0, low=1))]
    assert [(worker.id, worker.state) for worker in cluster.workers] == [("w0", "healthy")]
    stack.scheduler.go.set()
    assert (await waiting).status_code == 200


async def test_many_watchers_are_one_look(stack: Stack) -> None:
    answers = await asyncio.gather(*(stack.http.get("/v1/cluster") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert stack.scheduler.described < 20


async def test_a_scheduler_that_fails_to_answer_is_left_out(stack: Stack) -> None:
    stack.scheduler.fleet = None  # type: ignore[assignment]
    assert (await stack.http.get("/v1/cluster")).json()["schedulers"] == []


async def test_a_key_sees_its_models_and_needs_the_scope(stack: Stack) -> None:
    stack.scheduler.fleet.workers.extend([seen("w0"), seen("w1", model="another")])
    own, other = await make_key(stack.redis, models=[MODEL]), await make_key(stack.redis, models=["none"])
    mute = await make_key(stack.redis, scopes=["generate"])

    async def closed() -> bool:
        return (await stack.http.get("/v1/cluster")).status_code == 401

    await eventually(closed)
    seen_by_own = (await stack.http.get("/v1/cluster", headers=own.headers)).json()
    assert [model["id"] for model in seen_by_own["models"]] == [MODEL]
    assert [worker["id"] for worker in seen_by_own["workers"]] == ["w0"]
    seen_by_other = (await stack.http.get("/v1/cluster", headers=other.headers)).json()
    assert seen_by_other["models"] == seen_by_other["workers"] == []
    assert (await stack.http.get("/v1/cluster", headers=mute.headers)).status_code == 403
