"""Answers over gRPC, token by token."""

from dataclasses import dataclass

import grpc

from headrace.v1.inference_pb2 import GenerateDelta, GenerateRequest
from headrace.v1.inference_pb2_grpc import InferenceStub


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything that a caller gets, by choice."""

    tokens: dict[int, list[int]]
    text: dict[int, str]
    finish: dict[int, int]
    completion_tokens: int


class Reading:
    """One answer as it comes."""

    def __init__(self, address: str, request: GenerateRequest) -> None:
        self._channel = grpc.insecure_channel(address)
        self._call = InferenceStub(self._channel).Generate(request, timeout=120)
        self.deltas: list[GenerateDelta] = []

    def until(self, tokens: int) -> None:
        """Reads so many tokens, over all choices."""
        while sum(len(delta.token_ids) for delta in self.deltas) < tokens:
            self.deltas.append(next(self._call))

    def rest(self) -> Answer:
        """Reads to the end."""
        self.deltas += self._call
        self._channel.close()
        own = {choice: [delta for delta in self.deltas if delta.choice == choice] for choice in range(self.choices)}
        for deltas in own.values():
            assert [delta.seq for delta in deltas] == list(range(len(deltas)))
        return Answer(
            tokens={choice: [token for delta in deltas for token in delta.token_ids] for choice, deltas in own.items()},
            text={choice: "".join(delta.text for delta in deltas) for choice, deltas in own.items()},
            finish={choice: deltas[-1].finish_reason for choice, deltas in own.items()},
            completion_tokens=self.deltas[-1].usage.completion_tokens,
        )

    @property
    def choices(self) -> int:
        return 1 + max(delta.choice for delta in self.deltas)
