"""Made-up figures for the tests of what becomes of a benchmark's."""

from toolkit.bench_record import Facts, Measurement, Record
from toolkit.cpu_time import CpuUse
from toolkit.loadtest import MIXED, ROWS, RowResult

FACTS = Facts(
    started="2025-01-01T00:00:00+00:00",
    command="headrace bench",
    git="v1",
    versions={"python": "3.11"},
    environment={},
    cpu="a CPU",
    cores=2,
)


def measurement(
    server: str, row: str, *, number: int = 0, output: float = 50.0, ttft_ms: float = 100.0, short: int = 0
) -> Measurement:
    result = RowResult(
        row=row,
        seed=7 + number,
        output_tokens_per_s=output,
        prompt_tokens_per_s=output * 10,
        ttft_p50_ms=ttft_ms,
        ttft_p99_ms=ttft_ms * 2,
        inter_token_p50_ms=20.0,
        wall_s=10.0,
        short_answers=short,
        server_ms={"total": ttft_ms * 3, "prefill": ttft_ms - 5} if server == "ours" else {},
    )
    cpu = CpuUse(worker_s=9.0, other_s=1.0, worker_rss_mib=500.0, control_plane_share=0.1)
    return Measurement(server, number, result, cpu if server == "ours" else None)


def record(*measurements: Measurement, batching: tuple[Measurement, ...] = ()) -> Record:
    return Record(FACTS, 1, 7, (*ROWS, MIXED), (), list(measurements), list(batching))
