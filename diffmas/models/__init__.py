"""transformers models on a trace: patching, what is refused, one forward pass, generate."""

from diffmas.models.patch import patch_model, unpatch_model
from diffmas.models.support import Unsupported

__all__ = ["Unsupported", "patch_model", "unpatch_model"]
