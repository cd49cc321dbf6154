from pathlib import Path

import pytest

from services.common.config import ConfigError
from services.gateway.errors import NotAllowed
from services.gateway.keys.prices import read_prices
from services.gateway.request import Usage

FILE = """
["org/model"]
prompt = 0.15
cached = 0.015
completion = 0.60
["*"]
prompt = 0.000001
completion = 0
"""


def test_costs_are_exact_and_rounded_up(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(FILE)
    prices = read_prices(path)
    price = prices.of("org/model")
    assert price.cost(Usage(1000, 1000, 0)) == 750_000
    assert price.cost(Usage(1000, 0, 1000)) == 15_000
    assert price.cost(Usage(3, 5, 2)) == 150 + 2 * 15 + 5 * 600
    other = prices.of("another")
    assert other.cost(Usage(1, 9, 0)) == 1
    assert other.cost(Usage(0, 9, 0)) == 0


def test_no_use_costs_more_than_the_worst(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text("[m]\nprompt = 0.1\ncached = 0.3\ncompletion = 0.7")
    price = read_prices(path).of("m")
    worst = price.worst(7, 11)
    uses = [
        price.cost(Usage(prompt, output, cached)) for prompt in (0, 7) for output in (0, 11) for cached in (0, prompt)
    ]
    assert worst == max(uses)


def test_without_a_price(tmp_path: Path) -> None:
    with pytest.raises(NotAllowed, match=r"'m' has no price.* HEADRACE_GATEWAY_PRICES names"):
        read_prices(None).of("m")


@pytest.mark.parametrize(
    "table", ["prompt = 1", "prompt = -1\ncompletion = 1", "prompt = 1\ncompletion = 1\noutput = 2"]
)
def test_a_bad_file_names_the_model(tmp_path: Path, table: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(f"[m]\n{table}")
    with pytest.raises(ConfigError, match=r"prices.toml: m: "):
        read_prices(path)
