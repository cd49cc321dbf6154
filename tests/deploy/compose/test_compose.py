"""What the Compose files, the images and Prometheus say of the services is what the services' own settings say."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.cache.config import CacheSettings
from services.common.config import CommonSettings, parse
from services.gateway.config import GatewaySettings
from services.scheduler.config import SchedulerSettings
from services.worker.config import WorkerSettings
from tests.proxies import LONGEST_WAIT_S

COMPOSE = Path(__file__).parents[3] / "deploy/compose"
SERVICES: dict[str, type[CommonSettings]] = {
    "cache": CacheSettings,
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "worker": WorkerSettings,
}


# Where each front is, with the file that it mounts and where.
FRONTS = {
    "nginx": ("compose.replicas.yaml", "./nginx/nginx.conf", "/etc/nginx/nginx.conf"),
    "haproxy": ("compose.haproxy.yaml", "./haproxy/haproxy.cfg", "/usr/local/etc/haproxy/haproxy.cfg"),
}


class Loader(yaml.SafeLoader):
    """Knows Compose's `!reset`, which takes away what the files before have."""


RESET = object()
Loader.add_constructor("!reset", lambda loader, node: RESET)


def services_of(file: str) -> dict[str, Any]:
    loaded = yaml.load((COMPOSE / file).read_text(), Loader)["services"]
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return services_of("compose.yaml")


@pytest.fixture(params=FRONTS)
def front(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def grpc_port(settings: Any) -> int:
    return int(settings.grpc_port if isinstance(settings, GatewaySettings) else settings.port)


def metrics_port(settings: Any) -> int:
    return int(settings.http_port if isinstance(settings, GatewaySettings) else settings.metrics_port)


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_is_a_setting_and_peers_are_addressed_by_name(services: dict[str, Any], name: str) -> None:
    # A variable's default stands behind ":-" in `${NAME:-default}`.
    environment = {
        key: value.partition(":-")[2].rstrip("}") if value.startswith("${") else value
        for key, value in services[name]["environment"].items()
    }
    settings = parse(SERVICES[name], name, environment)
    assert settings.schedulers == (f"scheduler:{SchedulerSettings().port}",)
    assert settings.caches == (f"cache:{CacheSettings().port}",)


def test_only_gateways_and_schedulers_know_where_redis_is(services: dict[str, Any]) -> None:
    told = {name for name, service in services.items() if "REDIS_URL" in str(service.get("environment"))}
    assert told == {"gateway", "scheduler"}
    assert all(services[name]["environment"]["HEADRACE_REDIS_URL"] == "redis://redis:6379/0" for name in told)


def test_a_prefill_worker_is_a_worker_but_for_its_role_and_found_as_one(services: dict[str, Any]) -> None:
    worker, prefill = services["worker"], services["prefill-worker"]
    assert prefill["environment"] == {**worker["environment"], "HEADRACE_WORKER_ROLE": "prefill"}
    assert prefill["profiles"] == ["prefill"] and "profiles" not in worker
    assert prefill["networks"]["default"]["aliases"] == ["worker"]
    own = {"environment", "profiles", "networks", "deploy"}
    assert {key: value for key, value in prefill.items() if key not in own} == {
        key: value for key, value in worker.items() if key not in own
    }


@pytest.mark.parametrize("name", SERVICES)
def test_health_is_asked_where_the_service_listens(services: dict[str, Any], name: str) -> None:
    probe = services[name]["healthcheck"]["test"]
    front = ["--front"] if name == "gateway" else []
    address = f"127.0.0.1:{grpc_port(SERVICES[name]())}"
    assert probe == ["CMD", "python", "-m", "services.common.probe", *front, address]


@pytest.mark.parametrize("name", SERVICES)
def test_prometheus_scrapes_every_replica(name: str) -> None:
    jobs = yaml.safe_load((COMPOSE / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    (job,) = [job for job in jobs if job["job_name"] == name]
    (discovery,) = job["dns_sd_configs"]
    assert (discovery["names"], discovery["type"]) == ([name], "A")
    assert discovery["port"] == metrics_port(SERVICES[name]())


def test_only_the_worker_image_gets_torch_and_none_runs_as_root() -> None:
    stages = (COMPOSE / "Dockerfile").read_text().split("\nFROM ")[1:]
    by_name = {stage.split()[2]: stage for stage in stages}
    assert set(SERVICES) <= set(by_name)
    for name in SERVICES:
        assert "USER headrace" in by_name[name]
        assert (" worker" in by_name[name].split("install_dependencies.py")[-1].split("\n")[0]) == (name == "worker")


def test_a_gateway_whose_ports_are_local_lets_callers_in_without_a_key(services: dict[str, Any]) -> None:
    gateway = services["gateway"]
    assert gateway["environment"]["HEADRACE_GATEWAY_ALLOW_ANONYMOUS"] == "${ALLOW_ANONYMOUS:-true}"
    mounted = {volume.split(":")[-2] for volume in gateway["volumes"]}
    assert mounted == {gateway["environment"][f"HEADRACE_GATEWAY_{name}"] for name in ("KEYS_FILE", "PRICES")}
    assert all(":-/dev/null}" in volume and volume.endswith(":ro") for volume in gateway["volumes"])


def test_ports_are_published_on_loopback_alone(services: dict[str, Any]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published and all(port.startswith("127.0.0.1:") for port in published)


def test_a_front_takes_over_the_ports_and_may_do_nothing_else(services: dict[str, Any], front: str) -> None:
    file, mounted, at = FRONTS[front]
    service = services_of(file)[front]
    assert services_of("compose.replicas.yaml")["gateway"]["ports"] is RESET
    assert service["ports"] == services["gateway"]["ports"]
    assert service["volumes"] == [f"{mounted}:{at}:ro"] and (COMPOSE / mounted).is_file()
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["healthcheck"]["test"][-1] == f"http://127.0.0.1:{GatewaySettings().http_port}/health/ready"
    assert seconds(service["stop_grace_period"]) >= GatewaySettings().drain_grace_s


def test_haproxy_takes_the_place_of_nginx_and_gateways_wait_until_it_knows(services: dict[str, Any]) -> None:
    over = services_of("compose.haproxy.yaml")
    assert over["nginx"] is RESET
    gateway = parse(GatewaySettings, "gateway", over["gateway"]["environment"])
    checks = re.search(r"check inter (\d+s) fall (\d+)", text_of("haproxy"))
    assert checks is not None
    assert seconds(checks[1]) * int(checks[2]) < gateway.drain_settle_s
    more = seconds(over["gateway"]["stop_grace_period"]) - seconds(services["gateway"]["stop_grace_period"])
    assert more >= gateway.drain_settle_s


def test_a_front_waits_longer_than_a_gateway_lets_a_request_wait(front: str) -> None:
    waits = re.findall(r"(?:timeout (?:client|server)|(?:read|next_upstream)_timeout) (\d+)s", text_of(front))
    assert len(waits) == {"nginx": 4, "haproxy": 2}[front] and set(waits) == {str(LONGEST_WAIT_S)}
    assert GatewaySettings().default_timeout_s < LONGEST_WAIT_S


def text_of(front: str) -> str:
    return (COMPOSE / FRONTS[front][1]).read_text()


def seconds(duration: str) -> int:
    assert duration.endswith("s") and not duration.endswith("ms"), duration
    return int(duration[:-1])
