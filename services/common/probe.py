"""Exit status 0 when grpc.health.v1 at an address answers SERVING, for container health checks.

`python -m services.common.probe HOST:PORT` asks a service, and shows the certificate that HEADRACE_MTLS_* name.
`python -m services.common.probe --front HOST:PORT [CERTIFICATE]` asks a gateway; CERTIFICATE is the file that it shows.
"""

import argparse
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common import mutual_tls
from services.common.config import CommonSettings, load
from services.common.tls import front_cert_at

_TIMEOUT_S = 3.0


def serving(channel: grpc.Channel) -> bool:
    """Whether the server as a whole says that it is ready. Closes the channel."""
    with channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def dial_service(address: str) -> grpc.Channel:
    credentials = mutual_tls.channel_credentials()
    if credentials is None:
        return grpc.insecure_channel(address)
    return grpc.secure_channel(address, credentials, mutual_tls.CHANNEL_OPTIONS)


def dial_front(address: str, certificate: str) -> grpc.Channel:
    """Raises OSError if the front shows another certificate, or nobody answers."""
    if not certificate:
        return grpc.insecure_channel(address)
    cert = front_cert_at(address, Path(certificate), _TIMEOUT_S)
    return grpc.secure_channel(address, cert.channel_credentials(), (("grpc.ssl_target_name_override", cert.name),))


def main() -> bool:
    parser = argparse.ArgumentParser(prog="python -m services.common.probe", description="Ask a server if it is ready.")
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("certificate", nargs="?", default="", help="that a gateway on TLS shows")
    parser.add_argument("--front", action="store_true", help="the address is the public one of a gateway")
    arguments = parser.parse_args()
    if arguments.front:
        try:
            return serving(dial_front(arguments.address, arguments.certificate))
        except OSError:
            return False
    mutual_tls.set_up("probe", load(CommonSettings, "probe"))
    return serving(dial_service(arguments.address))


if __name__ == "__main__":
    sys.exit(not main())
