"""The compiled path against the native one on tiny random models of every family and feature it claims."""

import ctypes
import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.kernels.compiled.activations import puts_whole_rows
from services.worker.engine.kernels.compiled.frame import Frame, gates_at_once
from services.worker.engine.kernels.compiled.isa import IsaName, choose_isa
from services.worker.engine.kernels.compiled.packing import padded_columns
from services.worker.engine.kernels.compiled.team import new_control
from services.worker.engine.kernels.paged_kv import PagedKV
from services.worker.engine.model.compiled_llama import CompiledLlama
from services.worker.engine.model.llama import LlamaModel
from services.worker.model_store import kernels_folder
from tests.services.worker.engine.compiled_models import (
    BLOCK_SIZE,
    CPU,
    PRECISIONS,
    Job,
    Pool,
    TwinKernels,
    load_compiled,
    load_twin,
    mixed_jobs,
    random_tokens,
    relative_errors,
    serve,
)
from tests.services.worker.engine.model.test_llama import LLAMA3
from tests.services.worker.engine.tiny_models import VOCABULARY, make_sequence, save_tiny

_GATED_PLACES = ((0, Frame.X), (1, Frame.X_GATED))  # of a product: what it reads, and what the next one does
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
# Those of the same sizes, so that their kernels are compiled once, first. QWEN2's heads share no keys; QWEN3's all do.
QWEN2: dict[str, Any] = {"num_key_value_heads": 4, "hidden_size": 128}
QWEN3: dict[str, Any] = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 128, "hidden_size": 96}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral window": ("MistralConfig", {"sliding_window": 21}),
    "qwen2": ("Qwen2Config", QWEN2),
    "qwen2 windows": (
        "Qwen2Config",
        {**QWEN2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", QWEN3),
}

Folders = Callable[[str], Path]
Compiled = Callable[..., CompiledLlama]
Twins = Callable[[str, str], LlamaModel]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The checkpoint of a case. Its matrices are small, so that no rounding decides about the outcome."""

    @cache
    def folder(case: str) -> Path:
        path = tmp_path_factory.mktemp("model")
        config_class, case_settings = CASES[case]
        model = save_tiny(path, config_class, **{**SIZES, **case_settings})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter *= 0.4
        model.save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="module")
def kernels(tiny_store: Path) -> Path:
    """Where compiled kernels are kept, for the models of equal shape."""
    return kernels_folder(tiny_store)


@pytest.fixture(scope="module")
def compiled(folders: Folders, kernels: Path) -> Compiled:
    @cache
    def model(case: str, precision: str, threads: int = 2) -> CompiledLlama:
        return load_compiled(folders(case), PRECISIONS[precision], kernels=kernels, threads=threads)

    return model


@pytest.fixture(scope="module")
def twins(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    @cache
    def model(case: str, precision: str) -> LlamaModel:
        return load_twin(folders(case), PRECISIONS[precision], tmp_path_factory.mktemp("twin"))

    return model


@pytest.mark.parametrize("case", CASES)
def test_float32_equals_the_native_path(case: str, compiled: Compiled, twins: Twins) -> None:
    ours, theirs = compiled(case, "float32"), twins(case, "float32")
    pool, twin_pool = Pool(ours), Pool(theirs)
    logits, expected = serve(ours, pool, mixed_jobs()), serve(theirs, twin_pool, mixed_jobs())
    torch.testing.assert_close(torch.cat(logits), torch.cat(expected), rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(pool.kv.storage, twin_pool.kv.storage, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("case", ["llama", "mistral window"])
def test_bfloat16_equals_float32_on_rounded_numbers(case: str, compiled: Compiled, twins: Twins) -> None:
    ours, theirs = compiled(case, "bfloat16"), twins(case, "bfloat16")
    pool, twin_pool = Pool(ours), Pool(theirs, dtype=torch.bfloat16)
    logits, expected = serve(ours, pool, mixed_jobs()), serve(theirs, twin_pool, mixed_jobs())
    # What is near the middle between two bfloat16 may become either.
    errors = relative_errors(logits, expected)
    assert errors.quantile(0.1) < 1e-5
    # Where activations are rounded as well, one that becomes the other moves all that follows from it.
    isa = choose_isa()
    rounds = isa.activation_bits(16) == 16
    assert errors.max() < (1e-2 if rounds else 2e-3)
    # AMX adds in another order than the twin: of the same numbers others are near the middle, one of them early on.
    most, share = (4e-2, 0.02) if isa.matrices else (1e-2 if rounds else 1e-3, 0.01)
    difference = (pool.kv.storage.float() - twin_pool.kv.storage.float()).abs()
    assert (difference <= 2.0**-7 * twin_pool.kv.storage.float().abs() + most).all()
    assert (difference > 0).float().mean() < share
    exact = serve(theirs, Pool(theirs), mixed_jobs())
    assert 0 < relative_errors(logits, exact).max() < 0.04


LENGTH = 70
CUTS = st.sets(st.integers(1, LENGTH), min_size=1, max_size=6).map(lambda cuts: tuple(sorted(cuts)))
COMPANIONS = st.lists(
    st.builds(
        lambda cuts, begins, seed: Job(random_tokens(LENGTH, seed=seed), cuts, begins),
        CUTS,
        st.integers(0, 9),
        st.integers(0, 99),
    ),
    max_size=12,
)


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=CUTS,
    begins=st.integers(0, 9),
    companions=COMPANIONS,
    place=st.integers(0, 12),
    threads=st.sampled_from([1, 2]),
)
def test_logits_depend_on_the_tokens_alone(
    precision: str,
    compiled: Compiled,
    cuts: tuple[int, ...],
    begins: int,
    companions: list[Job],
    place: int,
    threads: int,
) -> None:
    """To the last bit, whatever else is in the steps, however the prompt is cut, and whether a position's KV was
    computed as prompt or as output: what deterministic workers promise.
    """
    tokens = random_tokens(LENGTH, seed=1)
    model = compiled("llama", precision)
    [alone] = serve(model, Pool(model, blocks=512), [Job(tokens, (1,))])  # row n: after n + 1 tokens
    jobs = [*companions[:place], Job(tokens, cuts, begins), *companions[place:]]
    other = compiled("llama", precision, threads)
    logits = serve(other, Pool(other, blocks=512, fill=7.0, seed=2), jobs)[min(place, len(companions))]
    assert torch.equal(logits, alone[cuts[-1] - 1 :])


@pytest.mark.parametrize("precision", ["int8", "int8 bfloat16", "int4", "int4 bfloat16"])
def test_quantized_equals_float32_on_the_values_of_its_weights(
    precision: str, compiled: Compiled, twins: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, dtype = compiled("llama", precision), twins("llama", precision), PRECISIONS[precision].dtype
    logits = serve(ours, Pool(ours), mixed_jobs())
    # In some rows a number near the middle between two bytes became the other one; in the rest only float32 rounds.
    errors = relative_errors(logits, serve(theirs, Pool(theirs, dtype=dtype), mixed_jobs()))
    assert errors.quantile(0.1) < 1e-5
    assert errors.max() < 0.05
    monkeypatch.setattr(theirs, "_kernels", TwinKernels())  # activations as they are
    errors = relative_errors(logits, serve(theirs, Pool(theirs, dtype=dtype), mixed_jobs()))
    assert 0.005 < errors.median() < 0.03
    assert errors.max() < 0.06


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_tied_head_is_quantized_and_the_embedding_is_not(
    precision: str, folders: Folders, compiled: Compiled
) -> None:
    ours = compiled("llama tied", precision)
    reference = serve(compiled("llama tied", "float32"), Pool(ours), mixed_jobs())
    assert (
        relative_errors(serve(ours, Pool(ours), mixed_jobs()), reference).median()
        < {"int8": 0.05, "int4": 0.5}[precision]
    )


cuts = st.sets(st.integers(1, 69), max_size=6).map(lambda found: (*sorted(found), 70))


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=cuts, begins=st.integers(0, 4), companions=st.integers(0, 6))
def test_a_sequences_logits_do_not_depend_on_how_its_work_is_cut_up(
    precision: str, compiled: Compiled, cuts: tuple[int, ...], begins: int, companions: int
) -> None:
    """Bit by bit: alone and in one piece, or in chunks beside others."""
    model, job = compiled("llama", precision), Job(random_tokens(80, seed=5), (70,))
    [alone] = serve(model, Pool(model), [job])
    others = mixed_jobs()[:companions]
    together = serve(model, Pool(model, seed=2), [*others, replace(job, cuts=cuts, begins=begins)])
    assert torch.equal(together[-1], alone)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8 bfloat16"])
@pytest.mark.parametrize("case", ["qwen3", "mistral window", "llama biases"])
def test_nor_do_they_with_windows_norms_of_heads_or_biases(case: str, precision: str, compiled: Compiled) -> None:
    model = compiled(case, precision)
    alone = [serve(model, Pool(model), [Job(job.tokens, job.cuts[-1:])])[0] for job in mixed_jobs()]
    for ours, expected in zip(serve(model, Pool(model, seed=2), mixed_jobs()), alone, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8 bfloat16", "int4 bfloat16"])
def test_any_number_of_threads_gives_the_same_bits(precision: str, compiled: Compiled) -> None:
    """More of them than processors, too, so that some are held up anywhere; and so many rows that each has its own."""
    one, *more = (compiled("llama", precision, threads) for threads in (1, 2, 3))
    jobs = [*mixed_jobs(), Job(random_tokens(490, seed=490), (480,), 1)]
    expected = torch.cat(serve(one, Pool(one, blocks=128), jobs))
    for model in more:
        for _ in range(5):
            assert torch.equal(torch.cat(serve(model, Pool(model, blocks=128), jobs)), expected)


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        ("qwen3", "float32"),
        ("llama biases", "float32"),
        ("llama biases", "bfloat16"),
        ("llama", "bfloat16"),
        ("llama", "int4 bfloat16"),
        ("llama biases", "int8 bfloat16"),
    ],
)
def test_a_phase_done_again_at_the_end_of_its_step_writes_the_same(
    case: str, precision: str, compiled: Compiled
) -> None:
    """As a thread does that was held up in it, while the others went on."""
    model = compiled(case, precision, 2)
    pool = Pool(model)
    slices = [Slice(make_sequence(random_tokens(n, seed=n), pool.take(1)), 0, n) for n in (3, 5)]
    logits = model.forward(Batch(tuple(slices)), pool.kv)
    step = model._step
    assert step._places is step._apart
    layers, frame, addresses = step._shape.layers, step._frame, step._library.addresses
    at_once, puts_later = gates_at_once(step._isa, step._shape), puts_whole_rows(step._shape.weight_bits)
    phases = [("NORM_SAMPLED", layers)]
    for layer in reversed(range(layers)):
        phases += [] if at_once else [("SWIGLU_ROWS", layer)]
        phases += [("NORM_ROWS", 2 * layer + 1)] + [("PUT_ATTENDED", layer)] * puts_later
        phases += [("ATTEND", layer), ("WRITE_KV", layer), ("NORM_ROWS", 2 * layer)]
    written = (torch.from_numpy(step._apart.memory), pool.kv.storage.view(torch.uint8), logits)
    expected = [each.clone() for each in written]

    def again(name: str, *arguments: int) -> None:
        phase = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * (4 + len(arguments)))(addresses[name])
        control = new_control(1)
        phase(control.ctypes.data, 1, 0, *arguments, int(frame[Frame.SCRATCH]))
        for ours, before in zip(written, expected, strict=True):
            assert torch.equal(ours, before), f"{name} with {arguments}"

    for product in range(4 * layers, -1, -1):
        if product % 4 != 2 or not at_once:
            again(*_linear_again(step, product))
    for name, which in phases:
        again(name, frame.ctypes.data, which)
    for layer in reversed(range(layers)) if at_once else ():
        product = 4 * layer + 2
        x, gated = (int(frame[field] + (product + n) * frame[Frame.PLACE_BYTES]) for n, field in _GATED_PLACES)
        words, _, bias = step._kept[Frame.LINEARS][product].tolist()
        again("GATED_LINEAR", 1, 1, 8, x, words, bias, gated)


def _linear_again(step: Any, product: int) -> tuple[Any, ...]:
    """A product's kernel and its arguments, but for a team's and scratch memory, as the step calls it."""
    frame, shape, isa = step._frame, step._shape, step._isa
    head = product == 4 * shape.layers
    depth, columns, read, written = {
        0: (shape.hidden, shape.qkv_size, Frame.X, Frame.PRODUCT),
        1: (shape.query_size, shape.hidden, Frame.X, Frame.DELTA),
        2: (shape.hidden, 2 * shape.intermediate, Frame.X, Frame.PRODUCT),
        3: (shape.intermediate, shape.hidden, Frame.X_GATED, Frame.DELTA),
    }[product % 4]
    count, rows = frame[Frame.ROWS], frame[Frame.TILE_ROWS]
    if head:
        columns, count, rows = shape.vocabulary, frame[Frame.SAMPLED], frame[Frame.SAMPLED_TILE_ROWS]
    x, scales, sums, out = (
        int(frame[field] + product * frame[Frame.PLACE_BYTES])
        for field in (read, Frame.X_SCALES, Frame.X_SUMS, written)
    )
    width = padded_columns(columns, isa)
    words, weight_scales, bias = step._kept[Frame.LINEARS][product].tolist()
    return (
        "HEAD_LINEAR" if head else "LINEAR", 1, int(-(-count // rows)), int(rows), depth, x, scales, sums, words,
        weight_scales, bias, width // isa.panel_columns, int(frame[Frame.LOGITS]) if head else out, 4 * width,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8 bfloat16", "int4 bfloat16"])
def test_nan_that_others_left_in_the_pool_reaches_no_sequence(precision: str, compiled: Compiled) -> None:
    for case in ("llama", "mistral window"):
        model = compiled(case, precision)
        clean, dirty = Pool(model), Pool(model, fill=torch.nan)
        for ours, expected in zip(serve(model, dirty, mixed_jobs()), serve(model, clean, mixed_jobs()), strict=True):
            assert torch.equal(ours, expected)


def test_a_sequences_own_nan_stays_with_it(folders: Folders, kernels: Path) -> None:
    """One request's overflow, here of one token's embedding, must not end in another's answer."""
    model = load_compiled(folders("llama"), PRECISIONS["float32"], kernels=kernels)
    jobs = mixed_jobs()
    embedding = model._step._weights.embedding
    for job in jobs:
        job.tokens[:] = [token if token != 7 else 8 for token in job.tokens]
    expected = serve(model, Pool(model), jobs)
    jobs[2].tokens[3] = 7
    embedding[7] = torch.nan
    results = serve(model, Pool(model), jobs)
    for number, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        assert ours.isnan().all() if number == 2 else torch.equal(ours, theirs)


def test_room_grows_with_rows_and_context(folders: Folders, kernels: Path, twins: Twins) -> None:
    """Beyond what is reserved for the first step, and then for one of a few rows again."""
    model, twin = load_compiled(folders("llama"), PRECISIONS["float32"], kernels=kernels), twins("llama", "float32")
    jobs = [
        Job(random_tokens(4, seed=1), (2,)),
        Job(random_tokens(70, seed=2), (64,), begins=1),
        Job(random_tokens(1103, seed=3), (500, 1100), begins=2),
        *(Job(random_tokens(5, seed=seed), (4,), begins=4) for seed in range(10, 40)),
        Job(random_tokens(4, seed=4), (2,), begins=9),
    ]
    pools = Pool(model, blocks=128), Pool(twin, blocks=128)
    logits, expected = serve(model, pools[0], jobs), serve(twin, pools[1], jobs)
    torch.testing.assert_close(torch.cat(logits), torch.cat(expected), rtol=1e-5, atol=5e-5)


def test_the_last_position_of_the_model_can_be_computed(compiled: Compiled, twins: Twins) -> None:
    model, twin = compiled("llama", "float32"), twins("llama", "float32")
    job = Job(random_tokens(SIZES["max_position_embeddings"], seed=1), (1030, SIZES["max_position_embeddings"] - 1))
    [ours], [expected] = serve(model, Pool(model, blocks=128), [job]), serve(twin, Pool(twin, blocks=128), [job])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=5e-5)


def test_one_model_serves_several_pools(compiled: Compiled) -> None:
    model = compiled("llama", "float32")
    small, large = Pool(model, blocks=20), Pool(model, blocks=100)
    [first] = serve(model, small, [Job(random_tokens(40, seed=1), (40,))])
    [second] = serve(model, large, [Job(random_tokens(40, seed=1), (40,))])
    assert torch.equal(first, second)
    assert small.kv.storage.any() and large.kv.storage.any()


def test_logits_are_given_for_slices_that_sample_alone(compiled: Compiled) -> None:
    model = compiled("llama", "float32")
    pool = Pool(model)
    begun, done = make_sequence([1, 2, 3, 4], pool.take(1)), make_sequence([5, 6], pool.take(1))
    assert model.forward(Batch((Slice(begun, 0, 2),)), pool.kv).shape == (0, VOCABULARY)
    logits = model.forward(Batch((Slice(begun, 2, 1), Slice(done, 0, 2))), pool.kv).clone()
    assert logits.shape == (1, VOCABULARY)
    assert logits.dtype is torch.float32
    alone = make_sequence([5, 6], pool.take(1))
    assert torch.equal(model.forward(Batch((Slice(alone, 0, 2),)), pool.kv), logits)


def test_a_pool_of_another_block_size_is_refused(compiled: Compiled) -> None:
    model = compiled("llama", "float32")
    kv = PagedKV(model.facts.layer_shapes, 4, 2 * BLOCK_SIZE, torch.float32, CPU)
    with pytest.raises(ValueError, match="compiled for blocks of 16 tokens, not of 32"):
        model.forward(Batch((Slice(make_sequence([1], [0]), 0, 1),)), kv)


def test_the_facts(compiled: Compiled) -> None:
    facts = {precision: compiled("llama", precision).facts for precision in PRECISIONS}
    for precision, each in facts.items():
        assert (each.implementation, each.dtype) == ("compiled", PRECISIONS[precision].dtype)
        assert each.quantization == PRECISIONS[precision].quantize
        assert each.instruction_set in get_args(IsaName)
        assert (each.vocabulary_size, each.max_context_tokens) == (VOCABULARY, 2048)
    sizes = [facts[precision].weight_bytes for precision in ("float32", "bfloat16", "int8", "int4 bfloat16")]
    assert sizes == sorted(sizes, reverse=True)


def test_the_threads_of_a_model_end_with_it(folders: Folders, kernels: Path) -> None:
    before = set(threading.enumerate())
    model = load_compiled(folders("llama"), PRECISIONS["float32"], kernels=kernels, threads=3)
    serve(model, Pool(model), mixed_jobs()[:1])
    helpers = set(threading.enumerate()) - before
    assert sorted(helper.name for helper in helpers) == ["kernel-1", "kernel-2"]
    del model
    gc.collect()
    assert not any(helper.is_alive() for helper in helpers)
