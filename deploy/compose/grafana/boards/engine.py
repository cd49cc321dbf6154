"""Engines, their KV pools, and KV that moves."""

from deploy.compose.grafana.board import Board, Panel
from deploy.compose.grafana.boards.queries import KV_USE, MODEL_NAME, PREFIX_HITS, mean, quantile, rate

ENGINE = Board(
    "engine",
    "engine and KV",
    [
        (
            "Engines",
            [
                Panel(
                    "Sequences",
                    "short",
                    [
                        ("running, {{instance}}", f"vllm:num_requests_running{{{MODEL_NAME}}}"),
                        ("waiting, {{instance}}", f"vllm:num_requests_waiting{{{MODEL_NAME}}}"),
                    ],
                    "In the batch, and taken on without a place in it.",
                ),
                Panel(
                    "Steps",
                    "s",
                    [(f"p{q * 100:g}", quantile(q, "headrace_engine_step_seconds", MODEL_NAME)) for q in (0.5, 0.95)],
                    "Duration of a step.",
                ),
                Panel(
                    "Tokens in a step",
                    "short",
                    [("{{instance}}", mean("vllm:iteration_tokens_total", MODEL_NAME, "instance"))],
                    "Mean, of prompts and outputs together.",
                ),
                Panel(
                    "Tokens computed",
                    "short",
                    [
                        ("prompt, {{instance}}", rate("vllm:prompt_tokens_total", MODEL_NAME, "instance")),
                        ("output, {{instance}}", rate("vllm:generation_tokens_total", MODEL_NAME, "instance")),
                    ],
                    "Per second.",
                ),
                Panel(
                    "Ends of sequences",
                    "ops",
                    [("{{finished_reason}}", rate("vllm:request_success_total", MODEL_NAME, "finished_reason"))],
                    "By reason; abort: nobody wanted it any more.",
                ),
                Panel(
                    "Trouble",
                    "ops",
                    [
                        ("preempted, {{instance}}", rate("vllm:num_preemptions_total", MODEL_NAME, "instance")),
                        (
                            "failed, {{instance}}",
                            rate("headrace_engine_failed_sequences_total", MODEL_NAME, "instance"),
                        ),
                    ],
                    "Sequences that lost their blocks to older ones, and those that the engine gave up.",
                ),
                Panel(
                    "Memory",
                    "bytes",
                    [("{{gpu_id}}, {{instance}}", "llm_gpu_memory_bytes")],
                    "Of each GPU, or of the process where there is none (cpu).",
                ),
                Panel(
                    "Cancelled to freed",
                    "s",
                    [("{{phase}}", quantile(0.95, "headrace_cancel_seconds", "", "phase"))],
                    "95th percentile of the time until blocks that nobody wants are free.",
                ),
            ],
        ),
        (
            "KV in the pools, and on its way",
            [
                KV_USE,
                PREFIX_HITS,
                Panel(
                    "KV that came from others",
                    "Bps",
                    [("{{source}}", rate("headrace_kv_imported_bytes_total", "", "source"))],
                    "By where it came from: a worker that held it, the cache service, a prefill worker.",
                ),
                Panel(
                    "Waiting for KV",
                    "s",
                    [("{{source}}", quantile(0.95, "headrace_kv_import_seconds", "", "source"))],
                    "95th percentile, from asking a source to its last block.",
                ),
                Panel(
                    "KV that went to others",
                    "Bps",
                    [
                        ("handed out", rate("headrace_kv_exported_bytes_total")),
                        ("of it to the cache service", rate("headrace_kv_offloaded_bytes_total")),
                    ],
                    "Of all workers.",
                ),
                Panel(
                    "The index",
                    "short",
                    [
                        ("blocks in the cache service's", "sum(headrace_cache_blocks)"),
                        ("blocks in the schedulers'", "max(headrace_index_blocks)"),
                    ],
                    "Distinct blocks that some worker or tier is known to hold.",
                ),
            ],
        ),
        (
            "The cache service",
            [
                Panel("Kept", "bytes", [("{{tier}}", "sum by (tier) (headrace_cache_stored_bytes)")], "By tier."),
                Panel(
                    "Blocks asked for",
                    "ops",
                    [
                        ("found, {{tier}}", rate("headrace_cache_hits_total", "", "tier")),
                        ("not kept", rate("headrace_cache_misses_total")),
                    ],
                    "A block that is not kept ends a fetch.",
                ),
                Panel(
                    "Traffic",
                    "Bps",
                    [
                        ("received", rate("headrace_cache_received_bytes_total")),
                        ("sent", rate("headrace_cache_sent_bytes_total")),
                    ],
                    "Bytes of blocks.",
                ),
            ],
        ),
    ],
)
