"""What a request's line in the log costs: `python -m tests.services.gateway.request_log_bench`, microseconds each."""

import logging
import os
import sys
import time
from types import SimpleNamespace
from typing import cast

from headrace.v1.job_pb2 import Job
from headrace.v1.sampling_pb2 import Sampling, Stopping
from services.common.config import CommonSettings
from services.common.telemetry import set_up
from services.gateway.active_request import ActiveRequest
from services.gateway.caller import Caller
from services.gateway.catalog import Model
from services.gateway.request import GenerationRequest
from services.gateway.request_log import RequestLog
from services.gateway.shedder import ModelLoad
from services.gateway.text.tokenization import ModelTokenizer
from tests.services.gateway.tokenizers_for_tests import bundle

_REPEATS = 2_000


def main() -> None:
    shown = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stderr = open(os.devnull, "w")
    active = _finished_request()
    for level, log_format in (("warning", "json"), ("info", "text"), ("info", "json")):
        set_up("gateway", CommonSettings.model_validate({"log_level": level, "log_format": log_format}))
        requests = RequestLog(texts=False)
        best = min(_microseconds(requests, active) for _ in range(20))
        print(f"level {level}, {log_format}: {best:.1f} us", file=shown)
    logging.shutdown()


def _microseconds(requests: RequestLog, active: ActiveRequest) -> float:
    began = time.perf_counter()
    for _ in range(_REPEATS // 20):
        requests.ended(active, "success")
    return (time.perf_counter() - began) / (_REPEATS // 20) * 1e6


def _finished_request() -> ActiveRequest:
    model = Model("model", 2048, 300, 16, ModelTokenizer(bundle()), 0, "fp")
    caller = Caller("b" * 32, "b" * 32, time.monotonic() - 1.5, 600.0)
    request = GenerationRequest(caller, model, list(range(128)), Sampling(), Stopping(max_tokens=128))
    active = ActiveRequest(request, Job(request_id="b" * 32), cast(ModelLoad, SimpleNamespace()))
    active.placed_at, active.first_token_at, active.worker_id = caller.arrived + 0.01, caller.arrived + 0.1, "worker-1"
    active.choices[0].token_ids, active.choices[0].finish_reason = list(range(128)), 1
    return active


if __name__ == "__main__":
    main()
