"""Starts the gateway: `python -m services.gateway`."""

import logging

from services.common import mutual_tls, telemetry
from services.common.channel import host_port
from services.common.config import ConfigError, load
from services.common.metrics_switch import registry_of
from services.common.redis.client import UnfitRedis
from services.common.serve import Stop, run
from services.gateway.config import GatewaySettings
from services.gateway.gateway import Gateway

log = logging.getLogger(__name__)


def main() -> None:
    settings = load(GatewaySettings, "gateway")
    telemetry.set_up("gateway", settings)
    mutual_tls.set_up("gateway", settings)

    async def serve(stop: Stop) -> None:
        gateway = Gateway(settings, registry_of(settings))
        http_port, grpc_port = await gateway.start()
        http, grpc = host_port(settings.host, http_port), host_port(settings.host, grpc_port)
        log.info("ready on %s (HTTP) and %s (gRPC)", http, grpc)
        await gateway.run(stop)

    try:
        run("gateway", serve)
    except UnfitRedis as error:
        log.error("gateway cannot start: %s", error.message)
        raise SystemExit(1) from None
    except ConfigError as error:
        log.error("gateway cannot start: %s", error)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
