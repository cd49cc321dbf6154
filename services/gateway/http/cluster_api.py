"""GET /v1/cluster: the workers, the schedulers and the queues, as JSON."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headrace.v1.scheduler_pb2 import DescribeFleetResponse, FleetWorker, WorkerRole
from services.gateway.active_request import ActiveRequests
from services.gateway.cluster import Cluster, Sighting
from services.gateway.http.callers import Callers
from services.gateway.keys.account import Account


class GatewayObject(msgspec.Struct):
    """The gateway that answers."""

    id: str
    # Accepted here and not ended, of all models.
    active_requests: int


class SchedulerObject(msgspec.Struct):
    id: str
    # Taken from the queue, waiting for a placement or an answer, of all models.
    held_jobs: int
    connected_gateways: int


class QueueObject(msgspec.Struct):
    """Jobs that no gateway runs yet, by priority."""

    high: int
    normal: int
    low: int


class ServedModelObject(msgspec.Struct):
    id: str
    # None while Redis does not answer.
    queue: QueueObject | None


class CreditsObject(msgspec.Struct):
    """What a worker would take on now, over all schedulers."""

    sequences: int
    blocks: int
    prefill_tokens: int


class WorkerObject(msgspec.Struct):
    id: str
    # A random id of its process: a restart is another.
    incarnation: str
    model: str
    # both, prefill or decode.
    role: str
    # healthy, draining, drained, silent, breaker_open or breaker_half_open.
    state: str
    running: int
    waiting: int
    max_sequences: int
    kv_blocks_used: int
    kv_blocks_total: int
    kv_block_bytes: int
    pending_prefill_tokens: int
    prefill_tokens_per_s: float
    # Prompt tokens looked up among its blocks since its start, and those found.
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    credits: CreditsObject
    deterministic: bool
    # None: nobody has said.
    price_per_hour: float | None


class ClusterObject(msgspec.Struct):
    gateway: GatewayObject
    schedulers: list[SchedulerObject]
    models: list[ServedModelObject]
    workers: list[WorkerObject]
    object: str = "cluster"


def cluster_route(cluster: Cluster, callers: Callers, gateway_id: str, active: ActiveRequests) -> Route:
    """Takes a key with the scope `models`, as the list of models does."""

    async def show(request: Request) -> Response:
        account = await callers.identify(dict(request.scope["headers"]), "models")
        sighting = await cluster.look()
        told = cluster_object(sighting, GatewayObject(gateway_id, len(active)), account)
        return Response(msgspec.json.encode(told), headers={"cache-control": "no-store"}, media_type="application/json")

    return Route("/v1/cluster", show)


def cluster_object(sighting: Sighting, gateway: GatewayObject, account: Account) -> ClusterObject:
    """What an account may see of the cluster: the models that it may use, and their workers."""
    return ClusterObject(
        gateway=gateway,
        schedulers=[
            SchedulerObject(fleet.scheduler_id, fleet.held_jobs, fleet.connected_gateways) for fleet in sighting.fleets
        ],
        models=[
            ServedModelObject(model, None if depths is None else QueueObject(**depths))
            for model, depths in sighting.queues.items()
            if account.allows_model(model)
        ],
        workers=[worker for worker in _workers(sighting.fleets) if account.allows_model(worker.model)],
    )


def _workers(fleets: Iterable[DescribeFleetResponse]) -> list[WorkerObject]:
    """Each process once, by id, however many schedulers know it."""
    views: dict[tuple[str, str], list[FleetWorker]] = defaultdict(list)
    for fleet in fleets:
        for worker in fleet.workers:
            views[worker.registration.worker_id, worker.registration.incarnation].append(worker)
    return [_worker_object(views[key]) for key in sorted(views)]


def _worker_object(views: Sequence[FleetWorker]) -> WorkerObject:
    """One worker as several schedulers see it: its newest state, and the condition that is least in its favour."""
    registration = views[0].registration
    state = max((view.state for view in views), key=lambda state: state.step)
    credits = [view.state.credits for view in views]
    condition = FleetWorker.Condition.Name(max(view.condition for view in views))
    return WorkerObject(
        id=registration.worker_id,
        incarnation=registration.incarnation,
        model=registration.model.name,
        role=WorkerRole.Name(state.role or registration.role).removeprefix("WORKER_ROLE_").lower(),
        state=condition.removeprefix("CONDITION_").lower(),
        running=state.running_sequences,
        waiting=state.waiting_sequences,
        max_sequences=registration.max_sequences,
        # One that has not reported yet holds nothing.
        kv_blocks_used=registration.total_blocks - state.free_blocks if views[0].HasField("state") else 0,
        kv_blocks_total=registration.total_blocks,
        kv_block_bytes=registration.block_bytes,
        pending_prefill_tokens=state.pending_prefill_tokens,
        prefill_tokens_per_s=round(state.prefill_tokens_per_s, 1),
        prefix_queried_tokens=state.prefix_queried_tokens,
        prefix_hit_tokens=state.prefix_hit_tokens,
        credits=CreditsObject(
            sequences=sum(credit.sequences for credit in credits),
            blocks=sum(credit.blocks for credit in credits),
            prefill_tokens=sum(credit.prefill_tokens for credit in credits),
        ),
        deterministic=registration.deterministic,
        price_per_hour=registration.price_per_hour if registration.HasField("price_per_hour") else None,
    )
