"""Settings of the worker service."""

import secrets
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from services.common.config import CommonSettings, OptionalPath, Port

Role = Literal["both", "prefill", "decode"]
PositiveInt = Annotated[int, Field(ge=1)]


class WorkerSettings(CommonSettings):
    """`HEADRACE_WORKER_*`."""

    # Interface that the gRPC server listens on. Loopback, since without mutual TLS nothing here asks for credentials.
    host: str = "127.0.0.1"
    port: Port = 50052
    # host:port at which gateways and other workers reach this one. Empty: the address it listens on, and on all
    # interfaces the one that this machine's own name stands for.
    advertise_address: str = ""
    # Where Prometheus scrapes /metrics. 0 takes a free port.
    metrics_port: Port = 9102
    # Name among the workers, unique; it survives a restart if set, and the incarnation tells the restarts apart.
    id: str = Field(default_factory=lambda: f"worker-{secrets.token_hex(3)}")
    # What this worker is preferred for. Every worker can do both.
    role: Role = "both"

    # A local folder, a .gguf file, a Hugging Face hub id (org/name or org/name@revision), or the default.
    model: str = "SmolLM2-135M-Instruct"
    # The name callers give. Empty: the last part of the folder's name, or the hub id without its revision.
    model_name: str = ""
    # Root of the model store. Unset: headrace/models under $XDG_CACHE_HOME, or under ~/.cache.
    store: Path | None = None
    # Whether code in a model's repository may run on this machine. It runs with all rights of this process.
    trust_remote_code: bool = False
    # auto: what the checkpoint holds (float16 becomes float32 on a CPU).
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # auto: a CUDA GPU if there is one.
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    # Which code runs the model. auto: the first of these that can. compiled: Llama-shaped models on a CPU; native: the
    # same in torch, also on a GPU; transformers: all others. echo: none, answers are the last message or the prompt.
    implementation: Literal["auto", "compiled", "native", "transformers", "echo"] = "auto"
    # How long each step of an echo takes, in milliseconds.
    echo_step_ms: float = Field(default=0.0, ge=0.0)
    # Bits per weight of the compiled path; activations are then 8 bits in the products. int8 has one scale for an
    # output's weights, which are transformed first; int4 one for 32, as GGUF's Q4_1, whose values it keeps. Faster, and
    # less exact than none.
    quantize: Literal["none", "int8", "int4"] = "none"
    # What the compiled path is compiled for. auto: the best that the processor has; baseline runs on any x86-64.
    instruction_set: Literal["auto", "amx", "avx512_bf16", "avx512", "avx2", "baseline"] = "auto"
    # Whether the same request, with the same seed, must always give the same tokens: whatever else runs, whatever is
    # cached, however often it was resumed. Only the compiled path can; the worker does not start otherwise.
    deterministic: bool = False
    # CPU threads that compute. 0: as many as the machine has cores.
    threads: int = Field(default=0, ge=0)

    # Tokens per KV block: the grain of prefix reuse. All workers of a model must agree.
    block_size: PositiveInt = 16
    # Size of the KV pool, in blocks. Unset: what kv_memory_fraction holds.
    kv_blocks: PositiveInt | None = None
    # Share of the device's free memory for weights and KV pool. Unset: 0.9 of a GPU, which is the worker's alone, and
    # 0.3 of the main memory, which it shares.
    kv_memory_fraction: float | None = Field(default=None, gt=0.0, le=1.0)
    # Longest sequence, prompt and output together, in tokens. Unset: the model's context.
    max_model_len: PositiveInt | None = None
    # Sequences that this worker takes on at once. Beyond some dozens a CPU only makes each slower.
    max_sequences: PositiveInt = 64
    # Tokens computed in one step. Bounds how long a running sequence waits for another's prompt: about one second of
    # prefill on a small CPU.
    max_batch_tokens: PositiveInt = 512
    # Prompt tokens taken on and not yet computed. More would wait here, where no other worker can take them.
    max_pending_prefill_tokens: PositiveInt = 8192
    # Rows that a step of few decodes may have (speculative decoding): up to half as many sequences share what is left
    # of them for drafts of what may follow. Only where no token changes by it: the compiled implementation. So many
    # take hardly longer than one there; its tiles have 12 at most. 0: no drafts.
    speculative_rows: int = Field(default=8, ge=0, le=12)
    # continuous: sequences join and leave at every step. static: a fixed batch that nobody joins, for comparison.
    batching: Literal["continuous", "static"] = "continuous"
    # Size of a static batch, in sequences.
    static_batch_size: PositiveInt = 8
    # How long the first of a static batch waits for others, in milliseconds.
    static_timeout_ms: int = Field(default=50, ge=0)

    # What an hour of this worker costs, in any unit: requests are charged its share. Unset: what device_prices says.
    price_per_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    # Prices per hour by device (services/worker/device_prices.py says what is in the file). Unset: there are none.
    device_prices: OptionalPath = None

    # How long a holder of KV may take from one block to the next before what is missing is computed here, in seconds.
    # Far above a hiccup of a busy process; a caller waits for it once, when a holder has died without a word.
    kv_fetch_stall_s: float = Field(default=1.0, gt=0)
    # The same of a prefill worker, which may be in a long step.
    kv_prefill_stall_s: float = Field(default=5.0, gt=0)

    # Prompts of at least so many tokens are given to the cache service once they have run and the engine is idle, so
    # that they need not be computed again after an eviction or a restart. Shorter ones are computed in about a second.
    kv_offload_least_tokens: PositiveInt = 512

    # After SIGTERM, or `headrace drain`, how long running sequences may go on here before they are handed to other
    # workers, in seconds. Whoever stops the process must grant some seconds more before it kills.
    drain_grace_s: float = Field(default=30.0, ge=0.0)

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.max_batch_tokens < self.max_sequences:
            raise ValueError(
                f"max_batch_tokens {self.max_batch_tokens} must be at least max_sequences {self.max_sequences}, since "
                "each running sequence takes one token a step"
            )
        return self
