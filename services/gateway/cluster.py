"""The whole cluster as this gateway finds it: the fleet of every scheduler, and how long the queues are.

What was found holds for a second, so that any number of watchers costs the schedulers and Redis one look a second.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from headrace.v1.scheduler_pb2 import DescribeFleetResponse
from services.common.errors import Unavailable
from services.common.redis.keys import PRIORITIES, PRIORITY_NAMES
from services.common.redis.queue import JobQueue
from services.gateway.catalog import Catalog
from services.gateway.links.placement_links import PlacementLinks

_HOLDS_S = 1.0

Depths = Mapping[str, int]
"""Jobs that no gateway runs yet, by priority: high, normal and low."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """One look at everything."""

    # One of each scheduler that answered.
    fleets: Sequence[DescribeFleetResponse]
    # By model; None of one whose queue could not be read.
    queues: Mapping[str, Depths | None]


class Cluster:
    """Looks when it is asked."""

    def __init__(
        self,
        placements: PlacementLinks,
        queue: JobQueue,
        catalog: Catalog,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._placements = placements
        self._queue = queue
        self._catalog = catalog
        self._clock = clock
        self._looking = asyncio.Lock()
        self._newest: Sighting | None = None
        self._holds_until = 0.0

    async def look(self) -> Sighting:
        """What was found within the last second. Takes up to two seconds where a scheduler does not answer."""
        async with self._looking:
            if self._newest is None or self._clock() >= self._holds_until:
                self._newest = await self._look()
                self._holds_until = self._clock() + _HOLDS_S
            return self._newest

    async def _look(self) -> Sighting:
        models = [model.name for model in self._catalog.usable()]
        fleets, depths = await asyncio.gather(self._placements.describe(), asyncio.gather(*map(self._depths, models)))
        return Sighting(fleets, dict(zip(models, depths, strict=True)))

    async def _depths(self, model: str) -> Depths | None:
        try:
            depths = await self._queue.depths(model)
        except Unavailable:
            return None
        return {PRIORITY_NAMES[priority]: depths[priority].jobs for priority in PRIORITIES}
