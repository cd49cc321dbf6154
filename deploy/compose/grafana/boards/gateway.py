"""Callers and their limits, what goes on in spite of failures, and the processes."""

from deploy.compose.grafana.board import Board, Panel
from deploy.compose.grafana.boards.queries import MODEL, RATE, rate, ratio

GATEWAY = Board(
    "gateway",
    "gateway and tenants",
    [
        (
            "Callers",
            [
                Panel(
                    "HTTP requests",
                    "reqps",
                    [("{{route}} {{status}}", rate("headrace_http_requests_total", "", "route, status"))],
                    "By route and status.",
                ),
                Panel(
                    "Refused for lack of room",
                    "reqps",
                    [("{{reason}}", rate("headrace_shed_total", "", "reason"))],
                    "queue_full, overloaded: ours; rate_limit, quota: the key's.",
                ),
                Panel(
                    "Requests of each model",
                    "reqps",
                    [("{{model}} {{status}}", rate("llm_requests_total", MODEL, "model, status"))],
                    "By outcome.",
                ),
                Panel(
                    "Held of keys' limits",
                    "short",
                    [("requests", "sum(headrace_budget_reservations)"), ("active", "sum(llm_active_requests)")],
                    "Requests with a reservation: running, or ended and not charged yet, for a moment.",
                ),
                Panel(
                    "Leases",
                    "short",
                    [("{{state}}", "sum by (state) (headrace_leases)")],
                    "Queue entries that each gateway renews.",
                ),
                Panel(
                    "Prompts found in caches",
                    "percentunit",
                    [
                        (
                            "{{model}}",
                            ratio("llm_cached_prompt_tokens_total", "llm_prompt_tokens_total", MODEL, "model"),
                        )
                    ],
                    "Share of the prompt tokens of requests that have begun.",
                ),
            ],
        ),
        (
            "Going on in spite of it",
            [
                Panel(
                    "Placed again",
                    "ops",
                    [("{{reason}}", rate("headrace_resumes_total", MODEL, "reason"))],
                    "Requests that a worker did not take, or did not finish.",
                ),
                Panel(
                    "Recorded answers",
                    "ops",
                    [
                        ("read again", rate("headrace_answers_resumed_total")),
                        ("by an idempotency key", rate("headrace_answers_attached_total")),
                        ("taken over from a dead gateway", rate("headrace_adoptions_total")),
                    ],
                    "What resumable requests and idempotency keys did.",
                ),
            ],
        ),
        (
            "Processes",
            [
                Panel(
                    "CPU",
                    "short",
                    [("{{job}} {{instance}}", "rate(process_cpu_seconds_total" + RATE + ")")],
                    "Cores that each process uses.",
                ),
                Panel(
                    "Memory",
                    "bytes",
                    [("{{job}} {{instance}}", "process_resident_memory_bytes")],
                    "Resident, of each process.",
                ),
                Panel("Up", "none", [("{{job}} {{instance}}", "up")], "1: Prometheus can read its metrics."),
            ],
        ),
    ],
)
