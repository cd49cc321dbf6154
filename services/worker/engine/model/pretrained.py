"""Loading a checkpoint through transformers, and the errors to expect of its code for hundreds of models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from services.worker.engine.model.interface import ModelError

# What a model's code raises when a checkpoint does not suit it.
FOREIGN_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


def load_pretrained(folder: Path, **arguments: Any) -> Any:
    """AutoModelForCausalLM.from_pretrained; refuses a checkpoint that leaves weights to be made up at random."""
    from transformers import AutoModelForCausalLM

    # With mismatched sizes ignored, transformers reports them and leaves the refusal, with their names, to us.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
    )
    model, report = loaded
    _check_all_loaded(report)
    return model


def _check_all_loaded(report: Mapping[str, Any]) -> None:
    for key, fault in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        # A mismatch is a name and two shapes.
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in report[key])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(f"the checkpoint {fault} {', '.join(names[:3])}{more}")
