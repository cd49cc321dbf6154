from pathlib import Path

import pytest
import torch

from services.worker.config import WorkerSettings
from services.worker.device_prices import find_price, price_of, read_prices
from services.worker.engine.model.interface import ModelError

PRICES = {"cpu": 0.08, "NVIDIA H100": 2.5, "NVIDIA H100 NVL": 3.0}
CPU = torch.device("cpu")


def settings(**given: object) -> WorkerSettings:
    return WorkerSettings.model_validate(given)


def test_the_longest_part_of_a_name_counts() -> None:
    assert find_price(PRICES, "NVIDIA H100 80GB HBM3") == 2.5
    assert find_price(PRICES, "NVIDIA H100 NVL") == 3.0
    assert find_price(PRICES, "cpu") == 0.08
    assert find_price(PRICES, "NVIDIA A10G") is None


def test_a_setting_beats_the_file_and_without_both_there_is_no_price(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text('[price_per_hour]\ncpu = 0.08\n"NVIDIA H100" = 2\n')
    assert price_of(settings(device_prices=path), CPU) == 0.08
    assert price_of(settings(device_prices=path, price_per_hour=1.0), CPU) == 1.0
    assert price_of(settings(device_prices=path, price_per_hour=0.0), CPU) == 0.0
    assert price_of(settings(), CPU) is None


def test_the_example_is_a_file_of_prices() -> None:
    assert find_price(read_prices(Path("deploy/device-prices.toml")), "cpu") is not None


@pytest.mark.parametrize("text", ["cpu = 1", "[price_per_hour]\ncpu = -1", "[price_per_hour]\ncpu = inf", "nonsense"])
def test_a_bad_file_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"prices\.toml"):
        read_prices(path)
    with pytest.raises(ModelError, match="missing"):
        read_prices(tmp_path / "missing.toml")
