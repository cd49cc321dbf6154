"""What one turn of the engine brings for one gateway, as it becomes a message."""

from headrace.v1 import sampling_pb2, worker_pb2
from services.worker.engine.logprobs import TokenLogprobs


class StepOutput:
    """Collects the tokens, and the rest. A sequence's tokens come one after the other."""

    __slots__ = ("_logprobs", "counts", "ended", "handles", "started", "times", "token_ids")

    def __init__(self) -> None:
        self.handles: list[int] = []
        self.token_ids: list[int] = []
        self.counts: list[int] = []
        self.started: list[worker_pb2.SequenceStarted] = []
        self.ended: list[worker_pb2.SequenceEnded] = []
        self.times: list[worker_pb2.SequenceTime] = []
        self._logprobs: dict[int, sampling_pb2.Logprobs] | None = None  # by handle; few sequences ask for them

    def add_token(self, handle: int, token: int) -> None:
        if self.handles and self.handles[-1] == handle:
            self.counts[-1] += 1
        else:
            self.handles.append(handle)
            self.counts.append(1)
        self.token_ids.append(token)

    def add_logprobs(self, handle: int, logprobs: TokenLogprobs) -> None:
        """Those of the sequence's next token that has none yet."""
        if self._logprobs is None:
            self._logprobs = {}
        values = self._logprobs.setdefault(handle, sampling_pb2.Logprobs())
        values.token_logprobs.append(logprobs.token)
        values.top_ids.extend(logprobs.top_ids)
        values.top_logprobs.extend(logprobs.top)

    def to_proto(self, step: int) -> worker_pb2.StepOutput:
        output = worker_pb2.StepOutput(
            step=step,
            handles=self.handles,
            token_ids=self.token_ids,
            token_counts=self.counts if len(self.token_ids) != len(self.handles) else (),
            started=self.started,
            ended=self.ended,
            times=self.times,
        )
        if self._logprobs is not None:
            for handle, values in self._logprobs.items():
                output.logprobs.add(handle=handle, values=values)
        return output
