"""How a stack's requests went: asks every gateway, and merges what they say."""

import asyncio
from collections.abc import Iterable, Sequence

import grpc.aio

from headrace.v1.inference_pb2 import Distribution, GetStatsRequest, InferenceMetrics, WindowMetrics
from headrace.v1.inference_pb2_grpc import InferenceStub
from services.common.channel import dial_front
from services.common.latency_sketch import LatencySketch
from services.common.tls import FrontCert

_TIMEOUT_S = 5.0


class NoStats(Exception):
    """One sentence for the person: a gateway did not answer."""


async def gather_stats(addresses: Sequence[str], cert: FrontCert | None) -> InferenceMetrics:
    """The merged summary of the gateways at these gRPC addresses. Raises NoStats, since a part would mislead."""
    return merge(await asyncio.gather(*(_ask(address, cert) for address in addresses)))


def merge(reports: Sequence[InferenceMetrics]) -> InferenceMetrics:
    """Several gateways' summaries, which carry their sketches, as one."""
    windows: dict[tuple[str, str], list[WindowMetrics]] = {}
    for report in reports:
        for window in report.windows:
            windows.setdefault((window.model, window.window), []).append(window)
    return InferenceMetrics(
        relative_error=max((report.relative_error for report in reports), default=0.0),
        windows=[_merged(model, name, parts) for (model, name), parts in windows.items()],
    )


async def _ask(address: str, cert: FrontCert | None) -> InferenceMetrics:
    async with dial_front(address, cert) as channel:
        try:
            report: InferenceMetrics = await InferenceStub(channel).GetStats(
                GetStatsRequest(sketches=True), timeout=_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise NoStats(f"The gateway at {address} does not answer: {error.code().name}.") from error
    return report


def _merged(model: str, window: str, parts: Sequence[WindowMetrics]) -> WindowMetrics:
    """Gateways started at different times: rates add up, each over its own time."""
    return WindowMetrics(
        model=model,
        window=window,
        seconds=max(part.seconds for part in parts),
        requests=sum(part.requests for part in parts),
        failed=sum(part.failed for part in parts),
        tokens=sum(part.tokens for part in parts),
        tokens_per_s=sum(part.tokens_per_s for part in parts),
        time_to_first_token_s=_distribution(part.time_to_first_token_s for part in parts),
        inter_token_latency_s=_distribution(part.inter_token_latency_s for part in parts),
        end_to_end_s=_distribution(part.end_to_end_s for part in parts),
    )


def _distribution(parts: Iterable[Distribution]) -> Distribution:
    return LatencySketch.merged(parts).to_proto(whole=False)
