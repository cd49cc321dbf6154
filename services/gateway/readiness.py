"""Whether this gateway can take requests, and if not, why."""

import asyncio
from collections.abc import Awaitable, Callable

from services.gateway.answers.leases import Leases
from services.gateway.catalog import Catalog
from services.gateway.links.placement_links import PlacementLinks

_LOOK_EVERY_S = 0.2


class Readiness:
    """Ready: one model usable, Redis reachable and fit, a scheduler connected, and not draining."""

    def __init__(self, catalog: Catalog, leases: Leases, placements: PlacementLinks) -> None:
        self._catalog = catalog
        self._leases = leases
        self._placements = placements
        self._draining = False

    def drain(self) -> None:
        """Not ready any more, for good."""
        self._draining = True

    def problem(self) -> str | None:
        """Why it is not ready, in one sentence, or None."""
        if self._draining:
            return "This gateway is shutting down."
        if self._leases.problem is not None:
            return self._leases.problem
        if not self._placements.connected:
            return "No scheduler is connected."
        if not self._catalog.usable():
            return "No model is usable yet: no worker has registered, or its tokenizer is on the way."
        return None

    async def follow(self, on_change: Callable[[str | None], Awaitable[None]]) -> None:
        """Tells of every change between ready (None) and not (the problem), until cancelled."""
        told: str | None = "starting"
        while True:
            problem = self.problem()
            if problem != told:
                told = problem
                await on_change(problem)
            await asyncio.sleep(_LOOK_EVERY_S)
