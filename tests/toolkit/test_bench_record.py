"""The JSON file and the facts in it."""

import json
import sys
from pathlib import Path

from tests.toolkit.bench_figures import measurement, record
from toolkit.bench_record import gather_facts, telling_variables, write


def test_the_file_has_everything(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "bench.json"
    write(record(measurement("ours", "single"), batching=(measurement("static", "mixed"),)), path)
    read = json.loads(path.read_text())
    assert read["facts"]["versions"] == {"python": "3.11"}
    assert read["rows"][-1]["output"] == {"least": 8, "most": 192}
    (first,) = read["measurements"]
    assert (first["server"], first["round"], first["result"]["row"]) == ("ours", 0, "single")
    assert first["cpu"]["control_plane_share"] == 0.1
    assert read["batching"][0]["cpu"] is None


def test_facts_of_this_machine() -> None:
    facts = gather_facts()
    assert facts.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts.cores >= 1
    assert facts.cpu
    assert facts.command.startswith("headrace")


def test_variables_that_tell_how_workers_compute() -> None:
    environment = {
        "HEADRACE_WORKER_DTYPE": "bfloat16",
        "OMP_NUM_THREADS": "1",
        "HEADRACE_WORKER_REDIS_URL": "redis://:password@h:1",
        "HEADRACE_GATEWAY_ID": "g",
        "HOME": "/",
    }
    assert telling_variables(environment) == {"HEADRACE_WORKER_DTYPE": "bfloat16", "OMP_NUM_THREADS": "1"}
