"""The picture of a benchmark."""

from pathlib import Path

from matplotlib.image import imread

from tests.toolkit.bench_figures import measurement, record
from toolkit.bench_plot import plot
from toolkit.loadtest import ROWS


def test_the_picture_grows_with_what_it_shows(tmp_path: Path) -> None:
    alone, compared = tmp_path / "new folder" / "alone.png", tmp_path / "compared.png"
    plot(record(measurement("ours", "single")), alone)
    rows = [measurement(server, row.name) for row in ROWS for server in ("ours", "vllm", "llama.cpp")]
    plot(record(*rows, batching=(measurement("continuous", "mixed"), measurement("static", "mixed"))), compared)
    small, large = imread(alone), imread(compared)
    assert small.shape[1] == large.shape[1]
    assert small.shape[0] < large.shape[0]
    assert small.min() < small.max()  # something is drawn
