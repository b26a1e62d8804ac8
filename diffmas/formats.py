"""The formats that rows are quantised to (`diffmas.ops.quantize`), by name and without torch, which agents do not wait for."""

__all__ = ["FORMATS"]

# The dtype of a payload, and its largest magnitude. int4 saves memory in files alone, two elements a byte (`pack`): attention
# reads them as int8.
FORMATS = {"int8": ("int8", 127), "fp8": ("float8_e4m3fn", 448), "int4": ("int8", 7)}
