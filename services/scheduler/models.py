"""One dispatcher and one intake per model, from the moment a worker or a gateway names it.

A model stays known when its last worker leaves: its queue is still looked after, and its jobs wait for the next worker.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from headrace.v1 import scheduler_pb2
from services.common.channel import cancel_and_wait
from services.common.errors import Unavailable
from services.scheduler.dispatch import Dispatcher
from services.scheduler.gateways import GatewayKey
from services.scheduler.intake import Intake

log = logging.getLogger(__name__)

MakeDispatcher = Callable[[str], Dispatcher]
MakeIntake = Callable[[str, Dispatcher], Intake]


@dataclass(frozen=True, slots=True)
class _Model:
    dispatcher: Dispatcher
    intake: Intake
    dispatching: "asyncio.Task[None]"


class Models:
    """All models that this scheduler has heard of. Placement requests are served from the start, the queue from `open`
    until `drain`.
    """

    def __init__(self, make_dispatcher: MakeDispatcher, make_intake: MakeIntake) -> None:
        self._make_dispatcher = make_dispatcher
        self._make_intake = make_intake
        self._models: dict[str, _Model] = {}
        self._open = False

    @property
    def held_jobs(self) -> int:
        return sum(model.dispatcher.held_jobs for model in self._models.values())

    def wake(self, name: str) -> None:
        """A worker of this model has reported, joined or left."""
        self._find(name).dispatcher.wake()

    def request(self, request: scheduler_pb2.PlacementRequest) -> None:
        """Places a running request again."""
        self._find(request.job.model).dispatcher.request(request)

    def gateway_connected(self, gateway: GatewayKey) -> None:
        for model in self._models.values():
            model.dispatcher.gateway_connected(gateway)

    def open(self) -> None:
        """Begins to take jobs from Redis."""
        self._open = True
        for model in self._models.values():
            model.intake.start()

    async def drain(self, grace_s: float) -> None:
        """Takes no more jobs, gives up those not offered, and waits for the answers to offers, `grace_s` at most."""
        self._open = False
        models = list(self._models.values())
        for model in models:
            await model.intake.stop()
            model.dispatcher.drain()
        await self._settle(models)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                for model in models:
                    await model.dispatcher.all_answered.wait()
        for model in models:
            model.dispatcher.give_up_offers()
        await self._settle(models)

    async def stop(self) -> None:
        """Ends everything. Jobs that are still held are left to their leases."""
        for model in self._models.values():
            await model.intake.stop()
            await cancel_and_wait([model.dispatching])

    async def _settle(self, models: Iterable[_Model]) -> None:
        for model in models:
            try:
                await model.intake.settle()
            except Unavailable as error:
                log.warning("jobs held here are left to their leases: %s", error)

    def _find(self, name: str) -> _Model:
        model = self._models.get(name)
        if model is None:
            dispatcher = self._make_dispatcher(name)
            dispatching = asyncio.create_task(dispatcher.run(), name=f"dispatch {name}")
            model = self._models[name] = _Model(dispatcher, self._make_intake(name, dispatcher), dispatching)
            if self._open:
                model.intake.start()
        return model
