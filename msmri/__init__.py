"""msmri: MRI reconstruction with diffusion models that were never shown a clean image."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msmri.model.prior import load_prior

__all__ = ["__version__", "load_prior"]
__version__ = "0.1.0"

_WHERE = {"load_prior": "msmri.model.prior"}  # imported when first asked for: torch takes its time


def __getattr__(name: str) -> Any:
    """Give what is offered here and lives elsewhere."""
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'msmri' has no attribute '{name}'")
