"""transformers models on a trace: patching, what is refused, one forward pass, generate."""

from diffmas.models.attention import Unsupported
from diffmas.models.patch import patch_model, unpatch_model

__all__ = ["Unsupported", "patch_model", "unpatch_model"]
