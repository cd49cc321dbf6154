"""What tokens cost, in millionths of whatever unit the price file is in. Costs are rounded up, once per request.

The file (TOML, or JSON of the same shape) has a table per model with prices per 1,000 tokens; the table `"*"` is for
all models that have none. `cached`, of prompt tokens whose KV was found, is by default what `prompt` is.

    ["org/model"]
    prompt = 0.15
    cached = 0.015
    completion = 0.60
"""

import math
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.common.api_keys import MICROS
from services.common.config import ConfigError, read_tables
from services.gateway.errors import NotAllowed
from services.gateway.request import Usage

_TOKENS = 1000
_OTHERS = "*"

Amount = Annotated[Decimal, Field(ge=0, decimal_places=6, lt=1_000_000)]


class Price(BaseModel):
    """Of one model, per 1,000 tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Amount
    completion: Amount
    cached: Amount | None = None

    def cost(self, usage: Usage) -> int:
        """In millionths."""
        cached = self.prompt if self.cached is None else self.cached
        fresh_tokens = usage.prompt_tokens - usage.cached_prompt_tokens
        money = self.prompt * fresh_tokens + cached * usage.cached_prompt_tokens
        money += self.completion * usage.completion_tokens
        return math.ceil(money * MICROS / _TOKENS)

    def worst(self, prompt_tokens: int, completion_tokens: int) -> int:
        """The most that these tokens can cost, in millionths."""
        all_or_none = [Usage(prompt_tokens, completion_tokens, cached) for cached in (0, prompt_tokens)]
        return max(self.cost(usage) for usage in all_or_none)


class Prices:
    """The prices of all models."""

    def __init__(self, by_model: Mapping[str, Price]) -> None:
        self._by_model = by_model

    def of(self, model: str) -> Price:
        """Raises NotAllowed: what has no price cannot be paid for."""
        price = self._by_model.get(model) or self._by_model.get(_OTHERS)
        if price is None:
            raise NotAllowed(
                f"The model {model!r} has no price, but this key has a budget of money: the server's setting "
                "HEADRACE_GATEWAY_PRICES names a file of prices.",
                field="model",
            )
        return price


def read_prices(path: Path | None) -> Prices:
    """The prices in a file, or none without one. Raises ConfigError that names the model at fault."""
    prices: dict[str, Price] = {}
    for model, table in (read_tables(path) if path else {}).items():
        try:
            prices[model] = Price.model_validate(table)
        except ValidationError as error:
            item = error.errors()[0]
            raise ConfigError(f"{path}: {model}: {'.'.join(map(str, item['loc']))}: {item['msg']}") from None
    return Prices(prices)
