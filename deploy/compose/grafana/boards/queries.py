"""Expressions and panels that several dashboards have."""

from deploy.compose.grafana.board import Panel

RATE = "[$__rate_interval]"
MODEL = 'model=~"$model"'
MODEL_NAME = 'model_name=~"$model"'
FAILED = f'status="error", {MODEL}'
ENDED = f'status=~"success|error", {MODEL}'
WHOLE = f'phase="total", {MODEL}'
PHASES = f'phase!="total", {MODEL}'


def rate(name: str, labels: str = "", by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''}(rate({name}{{{labels}}}{RATE}))"


def ratio(part: str, whole: str, labels: str, by: str) -> str:
    return f"{rate(part, labels, by)} / {rate(whole, labels, by)}"


def mean(name: str, labels: str = "", by: str = "") -> str:
    return f"{rate(f'{name}_sum', labels, by)} / {rate(f'{name}_count', labels, by)}"


def quantile(q: float, name: str, labels: str = "", by: str = "") -> str:
    return f"histogram_quantile({q}, {rate(f'{name}_bucket', labels, f'le, {by}' if by else 'le')})"


def quantiles(name: str, labels: str) -> list[tuple[str, str]]:
    return [(f"p{q * 100:g}", quantile(q, name, labels)) for q in (0.5, 0.95, 0.99)]


FIRST_TOKEN = Panel(
    "Time to first token",
    "s",
    quantiles("headrace_time_to_first_token_seconds", MODEL),
    "From a request's arrival at a gateway to its first token.",
)
TOKEN_GAP = Panel(
    "Time between tokens",
    "s",
    quantiles("headrace_inter_token_latency_seconds", MODEL),
    "Between two tokens of one choice, as a gateway gets them.",
)
BURN = Panel(
    "How fast the error budgets burn",
    "none",
    [
        ("errors, {{model}}", f"headrace:error_ratio:rate5m{{{MODEL}}} / 0.005"),
        ("slow first tokens, {{model}}", f"headrace:slow_first_token_ratio:rate5m{{{MODEL}}} / 0.05"),
    ],
    "1: just what the objectives allow (99.5 % without an error, 95 % of first tokens within 2.5 s). Alerts: "
    "prometheus/rules/alerts.yml.",
)
QUEUE_DEPTH = Panel(
    "Jobs in the queue",
    "short",
    [("{{model}} {{priority}}", f"max by (model, priority) (headrace_queue_depth{{{MODEL}}})")],
    "Requests that no gateway runs yet.",
)
KV_USE = Panel(
    "KV blocks in use",
    "percentunit",
    [("{{instance}}", f"vllm:kv_cache_usage_perc{{{MODEL_NAME}}}")],
    "Part of each worker's pool that running sequences hold. Close to 1, the newest of them lose their blocks.",
)
PREFIX_HITS = Panel(
    "Prompt tokens found in the pools",
    "percentunit",
    [
        (
            "{{model_name}}",
            f"{rate('vllm:prefix_cache_hits_total', MODEL_NAME, 'model_name')} / "
            f"{rate('vllm:prefix_cache_queries_total', MODEL_NAME, 'model_name')}",
        )
    ],
    "Share of the prompt tokens looked up that needed no computing.",
)
