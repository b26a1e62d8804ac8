"""Models and tokenizers by name: from the Hugging Face hub, a directory, or a GGUF file.

What transformers says about a name that leads nowhere, or about a damaged file, does not name it: here it does.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from diffmas.models.network import hub_is_away

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load_base", "load_config", "load_model", "load_tokenizer"]

# Of the options of a model, those that say where its files are, and hold for the tokenizer too.
PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "trust_remote_code")
ADAPTER_FILE = "adapter_config.json"
TOKENIZER_FILES = ("*token*", "vocab*", "tekken*", "*.model")


def load_model(name, *, dtype="auto", device=None, **options) -> "tuple[nn.Module, object]":
    """A base model and its tokenizer.

    name: a hub name, a directory, or a .gguf file (a path, or owner/name/file.gguf on the hub), whose weights are
    de-quantized. dtype: of the weights, a torch.dtype or its name; "auto" is the one they are stored in. device: where to put
    the model, by default the CPU. options: of transformers' `from_pretrained`. Raises ValueError naming what is missing or
    damaged.

        >>> model, tokenizer = load_model(base_directory)
        >>> model.config.model_type
        'qwen3'
    """
    tokenizer = load_tokenizer(name, **options)  # first: it is quick, and may be missing
    return load_base(name, dtype=dtype, device=device, **options), tokenizer


def load_config(name, **options):
    """The config of `load_model`'s model, without the model."""
    place = _place(name, options)  # before the import, for which a wrong path need not wait
    from transformers import AutoConfig

    return _explained(name, place, "model", lambda: AutoConfig.from_pretrained(**place))


def load_base(name, *, dtype="auto", device=None, **options) -> "nn.Module":
    """The model of `load_model` without its tokenizer; a multimodal one with its vision tower."""
    import torch
    import transformers
    from transformers.integrations import peft

    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype: expected 'auto', a torch.dtype or the name of one, got {dtype!r}")
    place, config = _place(name, options), load_config(name, **options)
    options = {**options, **place, "dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if place.get("local_files_only") and hasattr(peft, "maybe_load_adapters"):
        # Since 5 transformers looks for an adapter beside the model without these, and would ask the hub for it.
        where = {key: place[key] for key in ("cache_dir", "local_files_only") if key in place}
        options["adapter_kwargs"] = {**where, **options.get("adapter_kwargs", {})}
    if "gguf_file" in place and (packed := getattr(transformers, "GgufConfig", None)) is not None:
        # Since 5.24 transformers would leave the blocks packed where it has kernels for them.
        options["quantization_config"] = packed(dequantize=True)
    auto_class = _auto_class(config, name)
    model, found = _explained(name, place, "model", lambda: auto_class.from_pretrained(**options))
    what = f"model {str(name)!r}: expected all weights of a {type(model).__name__}"
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random ones
        raise ValueError(f"{what}, found no {missing[0]}")
    if mismatched := sorted(x if isinstance(x, str) else x[0] for x in found["mismatched_keys"]):  # before 5: names alone
        raise ValueError(f"{what}, got {mismatched[0]} of another shape than its config says")
    if "gguf_file" in place:
        # It is a plain model now, which can be saved; and its name leads back to the file. PEFT takes its name for a directory
        # or hub name, and would ask the hub for its config whenever an adapter is saved.
        for unused in ("quantization_config", "_model_name_or_path"):
            vars(model.config).pop(unused, None)
        model.config._name_or_path, model.name_or_path = f"{place['pretrained_model_name_or_path']}/{place['gguf_file']}", ""
    return model if device is None else model.to(device)


def load_tokenizer(name, **options):
    """The tokenizer of `load_model`. options: as there; those of the model alone are ignored."""
    place = _place(name, options)
    folder = Path(place["pretrained_model_name_or_path"]) / options.get("subfolder", "")
    files = [file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)]
    if folder.is_dir() and not files and "gguf_file" not in place:
        # transformers may build an empty one from the config alone
        raise ValueError(f"model {str(name)!r}: expected a tokenizer beside the model, found none; save the model's there")
    from transformers import AutoTokenizer

    return _explained(name, place, "tokenizer", lambda: AutoTokenizer.from_pretrained(**place))


def _place(name, options: dict) -> dict:
    """Where transformers finds a model, as arguments of `from_pretrained`; with gguf_file, if it is such a file.

    Raises ValueError for a path that leads nowhere, or to something else than a base model.
    """
    path, given = Path(name).expanduser(), f"model {str(name)!r}"
    place = {key: options[key] for key in PLACE if key in options}
    is_path = isinstance(name, os.PathLike) or path.is_absolute() or str(name)[:1] in "~."
    if path.suffix == ".gguf":
        if path.is_file():
            where, file = str(path.absolute().parent), path.name
        elif is_path or len(path.parts) < 3:
            raise ValueError(f"{given}: expected a GGUF file (or owner/name/file.gguf, on the hub), found none")
        else:
            where, file = "/".join(path.parts[:2]), "/".join(path.parts[2:])
        if find_spec("gguf") is None:
            raise ValueError(f"{given}: a GGUF file needs the package gguf: pip install gguf")
        return {**(place if path.is_file() else _reached(place)), "pretrained_model_name_or_path": where, "gguf_file": file}
    if path.is_file():
        raise ValueError(f"{given}: expected a directory, a .gguf file or a hub name, got another file")
    if path.is_dir():
        folder = path / options.get("subfolder", "")
        if (folder / ADAPTER_FILE).is_file():
            raise ValueError(f"{given}: expected a base model, found an adapter ({ADAPTER_FILE})")
        if not (folder / "config.json").is_file():
            files = sorted(file.name for file in folder.glob("*.gguf"))
            hint = f"; name one of its files: {', '.join(files)}" if files else ""
            raise ValueError(f"{given}: expected a directory with a model, found no config.json in it{hint}")
        return {**place, "pretrained_model_name_or_path": str(path)}
    if is_path or len(path.parts) > 2:
        raise ValueError(f"{given}: expected a directory, a .gguf file or a hub name, found no such directory")
    return {**_reached(place), "pretrained_model_name_or_path": str(name)}


def _reached(place: dict) -> dict:
    """Of a name on the hub: without a network, what was downloaded before is all there is."""
    asks = not (place.get("local_files_only") or place.get("proxies") or place.get("force_download"))
    return {**place, "local_files_only": True} if asks and hub_is_away() else place


def _auto_class(config, name):
    """The auto class for a config: a causal LM's where there is one, else that of multimodal models."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise ValueError(f"model {str(name)!r}: expected a causal language model, got one of type {config.model_type!r}")


def _explained(name, place: dict, what: str, load):
    """load(), whose errors become one line that names what is missing or damaged. what: model | tokenizer."""
    try:
        return load()
    except Exception as error:  # a damaged GGUF file raises whatever its bytes lead to
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        if (file := _damaged(place, error)) is not None:
            raise ValueError(f"{file}: expected a whole file of weights, got a damaged one ({said})") from error
        if not isinstance(error, (OSError, ValueError)) and type(error) is not Exception:  # the last: of the tokenizers library
            raise
        given = f"model {str(name)!r}"
        if isinstance(error, OSError) and not Path(name).expanduser().exists():
            raise ValueError(
                f"{given}: expected a directory, a .gguf file or a hub name, found no such path, and the hub gives no {what}: "
                f"{said}"
            ) from error
        raise ValueError(f"{given}: expected a {what} that transformers can load, got: {said}") from error


def _damaged(place: dict, error: Exception) -> Path | None:
    """The file that made loading fail, if it is one that nobody can read."""
    from transformers.utils import cached_file

    place = {key: x for key, x in place.items() if key in ("cache_dir", "revision", "subfolder")} | {
        "path_or_repo_id": place["pretrained_model_name_or_path"], "filename": place.get("gguf_file", "config.json"),
        "local_files_only": True,
    }  # fmt: skip
    if place["filename"] == "config.json" and not isinstance(error, SafetensorError):
        return None
    try:
        found = Path(cached_file(**place))
    except OSError:
        return None  # it never came here
    if found.suffix == ".gguf":
        return None if _whole_gguf(found) else found
    return next((file for file in sorted(found.parent.glob("*.safetensors")) if not _whole_safetensors(file)), None)


def _whole_safetensors(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return True
    except SafetensorError:
        return False


def _whole_gguf(file: Path) -> bool:
    from gguf import GGUFReader

    try:
        GGUFReader(file)
    except Exception:  # nothing of its own: struct.error, IndexError, ValueError, UnicodeDecodeError, ...
        return False
    return True
