"""What an hour of this worker costs: as its setting says, or by its device as a file says.

The file (TOML, or JSON of the same shape) has a table `price_per_hour`: prices by a part of a device's name. `cpu` is
the name of a CPU, a GPU has the one that its driver gives; of several parts that match the longest counts.

    [price_per_hour]
    cpu = 0.08
    "NVIDIA H100" = 2.50
"""

from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.common.config import ConfigError, read_tables
from services.worker.config import WorkerSettings
from services.worker.engine.model.interface import ModelError

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _PriceFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    price_per_hour: dict[str, Price]


def price_of(settings: WorkerSettings, device: torch.device) -> float | None:
    """In whatever unit; None: nobody has said. Raises ModelError for a bad file."""
    if settings.price_per_hour is not None or settings.device_prices is None:
        return settings.price_per_hour
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return find_price(read_prices(settings.device_prices), name)


def read_prices(path: Path) -> dict[str, float]:
    """Prices per hour by parts of names. Raises ModelError."""
    try:
        return _PriceFile.model_validate(read_tables(path)).price_per_hour
    except ConfigError as error:
        raise ModelError(f"device_prices: {error}.") from error
    except ValidationError as error:
        item = error.errors()[0]
        raise ModelError(f"device_prices: {path}: {'.'.join(map(str, item['loc']))}: {item['msg']}.") from None


def find_price(prices: dict[str, float], name: str) -> float | None:
    """That of the longest part of `name` that has one, in either case."""
    matching = [part for part in prices if part.lower() in name.lower()]
    return prices[max(matching, key=len)] if matching else None
