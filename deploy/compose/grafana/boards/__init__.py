"""What is on the dashboards. `python -m deploy.compose.grafana.generate` writes them to `dashboards/`."""

from deploy.compose.grafana.boards.cost import COST
from deploy.compose.grafana.boards.engine import ENGINE
from deploy.compose.grafana.boards.gateway import GATEWAY
from deploy.compose.grafana.boards.latency import LATENCY
from deploy.compose.grafana.boards.overview import OVERVIEW
from deploy.compose.grafana.boards.scheduler import SCHEDULER

BOARDS = (OVERVIEW, LATENCY, ENGINE, SCHEDULER, GATEWAY, COST)
