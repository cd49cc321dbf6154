"""What a worker is told of where its prompt's KV can come from: a plan, in the protocol's words."""

from collections.abc import Iterator

from headrace.v1.cache_pb2 import Holder
from headrace.v1.scheduler_pb2 import KvSource
from services.scheduler.fleet import Fleet
from services.scheduler.index import IndexUnion
from services.scheduler.kv_plans import JobShape, KvPlan


def kv_sources(plan: KvPlan, job: JobShape, index: IndexUnion, fleet: Fleet) -> Iterator[KvSource]:
    """Holders first, with the digests that they published, then the prefill worker. Who has gone since is left out."""
    for key, blocks in plan.holders:
        holder = index.holder(key)
        if holder is not None and holder.address:
            yield KvSource(
                kind=KvSource.KIND_CACHE if holder.kind == Holder.KIND_CACHE else KvSource.KIND_WORKER,
                address=holder.address,
                blocks=blocks,
                digests=index.digests(key, job.block_hashes[:blocks]),
            )
    if plan.prefill is not None:
        address = fleet.address(plan.prefill.worker.id)
        yield KvSource(kind=KvSource.KIND_PREFILL, address=address, blocks=plan.prefill.blocks)
