"""What requests cost, and what the machines' hours go to."""

from deploy.compose.grafana.board import Board, Panel
from deploy.compose.grafana.boards.queries import MODEL, MODEL_NAME, rate

COST = Board(
    "cost",
    "cost",
    [
        (
            "Money, in the unit of the workers' prices",
            [
                Panel(
                    "What requests cost an hour",
                    "none",
                    [("{{model}} {{phase}}", f"3600 * {rate('headrace_cost_total', MODEL, 'model, phase')}")],
                    "Time of workers that requests took, at the workers' prices.",
                    "stack",
                ),
                Panel(
                    "What the workers cost an hour",
                    "none",
                    [("{{model_name}}", f"sum by (model_name) (headrace_worker_price_per_hour{{{MODEL_NAME}}})")],
                    "The price of all workers that have one, at work or idle.",
                ),
                Panel(
                    "Cost of 1,000 output tokens",
                    "none",
                    [
                        (
                            "{{model}}",
                            f"1000 * sum by (model) (rate(headrace_cost_total{{{MODEL}}}[5m])) "
                            f"/ sum by (model) (rate(llm_tokens_generated_total{{{MODEL}}}[5m]))",
                        )
                    ],
                    "Of the last five minutes, prompts included. Costs count when a request ends, tokens as they come.",
                ),
                Panel(
                    "Saved an hour",
                    "none",
                    [("{{model}} {{reason}}", f"3600 * {rate('headrace_cost_saved_total', MODEL, 'model, reason')}")],
                    "What requests would have cost beside that; prefix: prompt tokens whose KV was found.",
                ),
            ],
        ),
        (
            "Time",
            [
                Panel(
                    "What the workers' time goes to",
                    "s",
                    [("{{use}}", rate("headrace_worker_seconds_total", MODEL_NAME, "use"))],
                    "Seconds per second, of all workers together.",
                    "stack",
                ),
                Panel(
                    "Time of workers that requests took",
                    "s",
                    [("{{model}} {{phase}}", rate("headrace_machine_seconds_total", MODEL, "model, phase"))],
                    "Seconds per second.",
                ),
            ],
        ),
    ],
)
