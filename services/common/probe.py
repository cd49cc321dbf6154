"""`python -m services.common.probe HOST:PORT [CERTIFICATE]`: exit status 0 when grpc.health.v1 there answers SERVING.

CERTIFICATE is the file that a gateway on TLS shows. For container health checks; one process that asks one question.
"""

import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.tls import front_cert_at

_TIMEOUT_S = 3.0


def serving(address: str, certificate: str = "") -> bool:
    """Whether the server as a whole says that it is ready. Raises ConfigError if the file holds no certificate."""
    try:
        channel = _dial(address, certificate)
    except OSError:
        return False
    with channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _dial(address: str, certificate: str) -> grpc.Channel:
    if not certificate:
        return grpc.insecure_channel(address)
    cert = front_cert_at(address, Path(certificate), _TIMEOUT_S)
    options = (("grpc.ssl_target_name_override", cert.name),)
    return grpc.secure_channel(address, cert.channel_credentials(), options)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m services.common.probe HOST:PORT [CERTIFICATE]")
    sys.exit(not serving(*sys.argv[1:]))
