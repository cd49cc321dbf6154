"""`python -m services.common.probe HOST:PORT`: exit status 0 when grpc.health.v1 there answers SERVING.

For container health checks; one process that asks one question.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def serving(address: str, timeout_s: float = 3.0) -> bool:
    """Whether the server as a whole says that it is ready."""
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m services.common.probe HOST:PORT")
    sys.exit(not serving(sys.argv[1]))
