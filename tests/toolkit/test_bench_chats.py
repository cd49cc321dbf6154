"""The chats against a gateway that answers at once and caches as it is told."""

from collections.abc import AsyncIterator

from headrace.v1.inference_pb2 import GenerateDelta, GenerateRequest, ListModelsResponse, ModelCard, Usage
from toolkit.bench_chats import ANSWER_TOKENS, CONVERSATIONS, TURNS, Chats, ChatsRow

BLOCK_SIZE = 16


class Gateway:
    """Keeps the KV of everything it has seen."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    async def ListModels(self, request: object, wait_for_ready: bool) -> ListModelsResponse:
        return ListModelsResponse(models=[ModelCard(name="m")])

    async def Generate(self, request: GenerateRequest, **options: object) -> AsyncIterator[GenerateDelta]:
        prompt = list(request.token_ids.ids)
        cached = max((common_blocks(prompt, other) for other in self.prompts), default=0) * BLOCK_SIZE
        answer = [len(self.prompts) + 1_000] * request.stopping.max_tokens
        self.prompts.append(prompt + answer)
        yield GenerateDelta(token_ids=answer[:1])
        yield GenerateDelta(token_ids=answer[1:])
        yield GenerateDelta(usage=Usage(prompt_tokens=len(prompt), cached_prompt_tokens=cached))


def common_blocks(prompt: list[int], other: list[int]) -> int:
    """Full blocks before the last token of both."""
    common = next((at for at, pair in enumerate(zip(prompt, other, strict=False)) if pair[0] != pair[1]), len(prompt))
    return min(common, len(prompt) - 1, len(other) - 1) // BLOCK_SIZE


async def test_a_cache_that_forgets_nothing_has_all_hits() -> None:
    gateway = Gateway()
    row = ChatsRow("kv_aware")
    await Chats(gateway, BLOCK_SIZE, row).run()  # type: ignore[arg-type]
    assert len(gateway.prompts) == len(row.first_token_s) == CONVERSATIONS * TURNS
    assert row.prompt_tokens == sum(len(prompt) - ANSWER_TOKENS for prompt in gateway.prompts)
    assert row.cached_tokens == row.best_cached_tokens > 0.7 * row.prompt_tokens
    assert row.computed_tokens == row.prompt_tokens - row.cached_tokens
