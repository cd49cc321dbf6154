"""Where the time of requests goes."""

from deploy.compose.grafana.board import Board, Panel
from deploy.compose.grafana.boards.queries import (
    FIRST_TOKEN,
    MODEL,
    MODEL_NAME,
    PHASES,
    TOKEN_GAP,
    WHOLE,
    mean,
    quantile,
    quantiles,
    rate,
)

LATENCY = Board(
    "latency",
    "latency",
    [
        (
            "The time budget of finished requests",
            [
                Panel(
                    "Where the time goes",
                    "s",
                    [("{{phase}}", mean("llm_latency_seconds", PHASES, "phase"))],
                    "Mean of each part; together they are the whole time of a request.",
                    "stack",
                ),
                Panel(
                    "Shares of the time",
                    "percentunit",
                    [
                        (
                            "{{phase}}",
                            f"{rate('llm_latency_seconds_sum', PHASES, 'phase')} / ignoring(phase) group_left() "
                            f"{rate('llm_latency_seconds_sum', WHOLE)}",
                        )
                    ],
                    "Of all the time that requests took.",
                    "stack",
                ),
                Panel(
                    "The slow ones, part by part",
                    "s",
                    [("{{phase}}", quantile(0.95, "llm_latency_seconds", PHASES, "phase"))],
                    "95th percentile of each part by itself.",
                ),
            ],
        ),
        (
            "What callers see",
            [
                Panel(
                    "Whole requests",
                    "s",
                    quantiles("llm_latency_seconds", WHOLE),
                    "From arrival to the last event.",
                ),
                FIRST_TOKEN,
                TOKEN_GAP,
                Panel(
                    "To the first worker",
                    "s",
                    quantiles("headrace_queue_seconds", MODEL),
                    "From a request's arrival to its first placement.",
                ),
            ],
        ),
        (
            "What workers see (vLLM's names)",
            [
                Panel(
                    "First tokens",
                    "s",
                    quantiles("vllm:time_to_first_token_seconds", MODEL_NAME),
                    "From a sequence's arrival at its worker.",
                ),
                Panel(
                    "Stages of a sequence",
                    "s",
                    [
                        (stage, quantile(0.95, f"vllm:request_{stage}_time_seconds", MODEL_NAME))
                        for stage in ("queue", "prefill", "decode")
                    ],
                    "95th percentiles: waiting for a place, computing the prompt, producing tokens.",
                ),
                Panel(
                    "Whole sequences",
                    "s",
                    quantiles("vllm:e2e_request_latency_seconds", MODEL_NAME),
                    "From arrival to the last token.",
                ),
            ],
        ),
    ],
)
