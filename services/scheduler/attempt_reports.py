"""What a gateway's reports mean to a worker's circuit breaker."""

from headrace.v1.scheduler_pb2 import AttemptReport
from services.scheduler.breaker import Breaker


def tell(breaker: Breaker, report: AttemptReport, now: float) -> None:
    """Tells the breaker of a worker, by its clock, what an attempt says of the worker."""
    key = report.request_id, report.attempt
    at = now - max(0, report.age_ms) / 1000
    match report.event:
        case AttemptReport.EVENT_BEGAN:
            breaker.probe_began()
        case AttemptReport.EVENT_FINISHED:
            breaker.finished()
        case AttemptReport.EVENT_FAILED | AttemptReport.EVENT_STALLED if report.probe:
            breaker.probe_failed(key)
        case AttemptReport.EVENT_FAILED:
            breaker.failed(at)
        case AttemptReport.EVENT_STALLED:
            breaker.stalled(at)
        case AttemptReport.EVENT_WITHDRAWN:
            breaker.withdraw_probe(key)
