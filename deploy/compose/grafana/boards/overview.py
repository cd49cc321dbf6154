"""What an operator looks at first."""

from deploy.compose.grafana.board import Board, Panel
from deploy.compose.grafana.boards.queries import (
    BURN,
    ENDED,
    FAILED,
    FIRST_TOKEN,
    KV_USE,
    MODEL,
    MODEL_NAME,
    PREFIX_HITS,
    QUEUE_DEPTH,
    TOKEN_GAP,
    rate,
)

OVERVIEW = Board(
    "overview",
    "overview",
    [
        (
            "Now",
            [
                Panel(
                    "Workers that take work",
                    "none",
                    [("", f'sum(max by (model) (headrace_workers{{state="healthy", {MODEL}}}))')],
                    "Healthy workers.",
                    "number",
                ),
                Panel(
                    "Active requests",
                    "none",
                    [("", f"sum(llm_active_requests{{{MODEL}}})")],
                    "Queued or running.",
                    "number",
                ),
                Panel(
                    "Output",
                    "short",
                    [("", rate("llm_tokens_generated_total", MODEL))],
                    "Tokens per second.",
                    "number",
                ),
                Panel(
                    "Errors",
                    "percentunit",
                    [
                        (
                            "",
                            f"{rate('llm_requests_total', FAILED)} / {rate('llm_requests_total', ENDED)}",
                        )
                    ],
                    "Share of the accepted requests that ended in an error.",
                    "number",
                    red_from=0.005,
                ),
                Panel(
                    "Oldest job",
                    "s",
                    [("", f"max(headrace_queue_age_seconds{{{MODEL}}})")],
                    "How long the oldest job has been in the queue.",
                    "number",
                    red_from=30,
                ),
                Panel(
                    "Fullest KV pool",
                    "percentunit",
                    [("", f"max(vllm:kv_cache_usage_perc{{{MODEL_NAME}}})")],
                    "Of all workers.",
                    "number",
                    red_from=0.95,
                ),
            ],
        ),
        (
            "Requests",
            [
                Panel(
                    "Requests ended",
                    "reqps",
                    [("{{status}}", rate("llm_requests_total", MODEL, "status"))],
                    "By outcome; refused: never accepted.",
                ),
                Panel(
                    "Tokens",
                    "short",
                    [
                        ("prompt", rate("llm_prompt_tokens_total", MODEL)),
                        ("of it cached", rate("llm_cached_prompt_tokens_total", MODEL)),
                        ("output", rate("llm_tokens_generated_total", MODEL)),
                    ],
                    "Per second, of requests that have begun.",
                ),
                BURN,
                FIRST_TOKEN,
                TOKEN_GAP,
                QUEUE_DEPTH,
                KV_USE,
                PREFIX_HITS,
                Panel(
                    "Active requests",
                    "short",
                    [("{{model}}", f"sum by (model) (llm_active_requests{{{MODEL}}})")],
                    "Accepted and not ended, queued ones included.",
                ),
            ],
        ),
    ],
)
