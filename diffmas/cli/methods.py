"""The names of what is compared and trained; apart from the config, so that the command line's help need not wait for torch."""

__all__ = ["METHODS", "TRAINED"]

METHODS = ("single", "text", "text_sft", "latent_mas", "stitch", "c2c", "diffmas")
TRAINED = ("diffmas", "text_sft", "stitch", "c2c")  # methods that `diffmas train` trains
