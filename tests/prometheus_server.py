"""A real Prometheus of a test's own, which scrapes a running stack by the rules that compose uses."""

import shutil
import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import yaml

from tests.flows.headrace_up import HeadraceUp, eventually
from tests.redis_server import free_port

COMPOSE = Path(__file__).parents[1] / "deploy/compose"
RULES = sorted((COMPOSE / "prometheus/rules").glob("*.yml"))
SCRAPES_EVERY_S = 1


def binary_of(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, f"there is no {name} here: install Debian's package prometheus"
    return found


class PrometheusServer:
    """Starts at construction and answers; `kill` at its end. What compose's file says but for addresses and times."""

    def __init__(self, folder: Path, stack: HeadraceUp) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.started = time.time()
        self._log = (folder / "prometheus.log").open("w")
        (folder / "prometheus.yml").write_text(yaml.safe_dump(_configuration(folder, stack, port)))
        command = (binary_of("prometheus"), f"--config.file={folder / 'prometheus.yml'}")
        options = (f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}")
        self._process = subprocess.Popen((*command, *options), stdout=self._log, stderr=subprocess.STDOUT)
        eventually(self._is_ready, "Prometheus is ready")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, Path(self._log.name).read_text()
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False


def _configuration(folder: Path, stack: HeadraceUp, port: int) -> object:
    """Static targets in place of Docker's names, and times that fit a test."""
    configuration = yaml.safe_load((COMPOSE / "prometheus/prometheus.yml").read_text())
    every = f"{SCRAPES_EVERY_S}s"
    configuration["global"] |= {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
    for job in configuration["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        members = [one for one in stack.state.processes if one.service == job["job_name"] and one.metrics_url]
        targets = [urlsplit(str(one.metrics_url)).netloc for one in members] or [f"127.0.0.1:{port}"]
        job["static_configs"] = [{"targets": targets}]
    configuration["rule_files"] = []
    for path in RULES:
        rules = yaml.safe_load(path.read_text())
        for group in rules["groups"]:
            group["interval"] = every
        (folder / path.name).write_text(yaml.safe_dump(rules))
        configuration["rule_files"].append(str(folder / path.name))
    return configuration
