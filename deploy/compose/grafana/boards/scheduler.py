"""The queue, and who gets its jobs."""

from deploy.compose.grafana.board import Board, Panel
from deploy.compose.grafana.boards.queries import MODEL, QUEUE_DEPTH, quantiles, rate

SCHEDULER = Board(
    "scheduler",
    "scheduler and queue",
    [
        (
            "Queue",
            [
                QUEUE_DEPTH,
                Panel(
                    "Age of the oldest job",
                    "s",
                    [("{{model}} {{priority}}", f"max by (model, priority) (headrace_queue_age_seconds{{{MODEL}}})")],
                    "It rises while nothing is placed.",
                ),
                Panel(
                    "Waiting in the queue",
                    "s",
                    quantiles("headrace_queue_wait_seconds", MODEL),
                    "From a job's entry to the offer that its gateway accepted.",
                ),
            ],
        ),
        (
            "Placement",
            [
                Panel(
                    "Placements",
                    "ops",
                    [("{{reason}}", rate("headrace_placements_total", MODEL, "reason"))],
                    "By what spoke for the worker; replaced: a request that ran already.",
                ),
                Panel(
                    "Answers to offers",
                    "ops",
                    [("{{answer}}", rate("headrace_offers_total", "", "answer"))],
                    "none: the gateway was silent, and the job was offered again.",
                ),
                Panel(
                    "Jobs held",
                    "short",
                    [("{{model}}, {{instance}}", f"headrace_scheduler_held_jobs{{{MODEL}}}")],
                    "Taken from Redis, and waiting for a placement or an answer.",
                ),
                Panel(
                    "Workers",
                    "short",
                    [("{{state}}", f"sum by (state) (max by (model, state) (headrace_workers{{{MODEL}}}))")],
                    "By state.",
                    "stack",
                ),
                Panel(
                    "Lost gateways' jobs",
                    "ops",
                    [
                        ("closed", rate("headrace_gateway_lost_total")),
                        ("offered to others", rate("headrace_orphans_total")),
                        ("no worker can run", rate("headrace_placement_refusals_total")),
                    ],
                    "Closed: the caller saw its connection break. Offered: its recorded answer goes on elsewhere.",
                ),
                Panel(
                    "Index",
                    "short",
                    [("{{instance}}", "headrace_index_blocks")],
                    "Blocks in each scheduler's copy of the index.",
                ),
            ],
        ),
    ],
)
