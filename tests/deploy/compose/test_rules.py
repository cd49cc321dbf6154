"""Prometheus' own tool accepts the configuration and the rules, and they fire on what they are for."""

import subprocess
from pathlib import Path

import yaml

from tests.prometheus_server import COMPOSE, RULES, binary_of

HERE = Path(__file__).parent
TESTS = HERE / "alerts_test.yml"


def promtool(*command: str) -> None:
    done = subprocess.run((binary_of("promtool"), *command), capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_and_its_rules_are_accepted() -> None:
    promtool("check", "config", str(COMPOSE / "prometheus/prometheus.yml"))


def test_the_rules_do_what_they_are_for() -> None:
    promtool("test", "rules", str(TESTS))


def test_every_alert_is_tested_and_fires_in_a_test() -> None:
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    tests = [alert for one in yaml.safe_load(TESTS.read_text())["tests"] for alert in one["alert_rule_test"]]
    assert alerts == {alert["alertname"] for alert in tests if alert["exp_alerts"]}
