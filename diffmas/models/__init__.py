"""transformers models on a trace: patching, what is refused, one forward pass, generate."""

from typing import TYPE_CHECKING

from diffmas.lazy import importing

if TYPE_CHECKING:
    from diffmas.models.patch import patch_model, unpatch_model
    from diffmas.models.support import Unsupported

_WHERE = {
    "Unsupported": "diffmas.models.support", "patch_model": "diffmas.models.patch", "unpatch_model": "diffmas.models.patch",
}  # fmt: skip
__getattr__, __dir__ = importing(__name__, _WHERE)

__all__ = ["Unsupported", "patch_model", "unpatch_model"]
