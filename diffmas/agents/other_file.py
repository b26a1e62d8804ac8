"""A team's other models on disk: in `others/NAME` of its directory each has its adapter and tokenizer as a team has them, its
projector, and `other.json`, which names the model. How they take part stands in the team's agents.json."""

import os
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from diffmas.agents import file
from diffmas.agents.encoder import Encoder, encoder_of
from diffmas.agents.member import Other
from diffmas.agents.projector import Between, Fuser, Projector
from diffmas.json_file import read_json, write_json
from diffmas.models.load import load_base, load_tokenizer
from diffmas.models.parts import causal_lm_of
from diffmas.models.patch import patch_model

__all__ = ["base_models", "load", "load_encoder", "made", "projector_of", "read_weights", "save"]

OTHER_FILE, PROJECTOR_FILE = "other.json", "projector.safetensors"
KINDS = {kind.kind: kind for kind in (Projector, Fuser)}
ENCODER = "encoder"


def projector_of(description: dict, sharer: nn.Module, receiver: nn.Module) -> Between:
    """A new projector between two patched models. description: its kind, and options of that. Raises ValueError for another."""
    options = dict(description)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"projector: expected a kind of {sorted([*KINDS, ENCODER])}, got {kind!r}")
    try:
        return KINDS[kind](sharer, receiver, **options)
    except TypeError as error:
        raise ValueError(f"projector: expected options of {KINDS[kind].__name__}, got {options} ({error})") from error


def made(kind: dict, model: nn.Module, tokenizer, receiver: nn.Module, **options) -> Other | Encoder:
    """An `Other` with a new projector of this kind (`projector_of`), or an `Encoder`. options: of these."""
    if kind.get("kind") == ENCODER:
        return Encoder(model, tokenizer, receiver, **{k: v for k, v in kind.items() if k != "kind"}, **options)
    for one in (model, receiver):
        if not hasattr(causal_lm_of(one), "diffmas_patch"):
            patch_model(one)
    return Other(model, tokenizer, projector_of(kind, model, receiver), **options)


def load_encoder(name, *, dtype="auto", device=None, **options) -> nn.Module:
    """A model to encode with, by a directory or hub name."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(name), dtype=dtype, **options)
    return model if device is None else model.to(device)


def directory(path, name: str) -> Path:
    return Path(path) / "others" / name


def save(path, others) -> None:
    """Writes what `load` reads. others: `Other`s by name."""
    for name, other in others.items():
        place = directory(path, name)
        head = file.save_model(place, other.model, other.tokenizer)
        save_file({key: x.detach().cpu().contiguous() for key, x in other.own_state().items()}, place / PROJECTOR_FILE)
        write_json(place / OTHER_FILE, head)


def base_models(path, names) -> dict[str, str | None]:
    """The base models of a directory's other models, by the names of these."""
    return {name: _head(directory(path, name))["base_model"] for name in names}


def _head(place: Path) -> dict:
    head = read_json(place / OTHER_FILE)
    file.check_kinds(head, file.HEAD, str(place / OTHER_FILE))
    return head


def read_weights(path, others) -> Callable[[], None]:
    """What copies the weights of a directory into others that are like them; raises ValueError for what does not fit, before
    anything is changed."""
    found = []
    for name, other in others.items():
        place, head = directory(path, name), _head(directory(path, name))
        file.check_base(head, other.model, place)
        file.check_like(place / OTHER_FILE, head, other.model, other.tokenizer)
        found.append((other, file.read_adapters(place, other.model), _own_state(place, other)))

    def copy() -> None:
        for other, adapters, state in found:
            file.put_adapters(other.model, adapters)
            other.load_state_dict(state, strict=False)

    return copy


def _own_state(place: Path, other: Other) -> dict:
    """The weights of a projector as they were saved; raises ValueError unless they are like those of `other`."""
    state = file.read_weights(place / PROJECTOR_FILE)
    wanted, found = ({key: list(x.shape) for key, x in d.items()} for d in (other.own_state(), state))
    if wanted != found:
        key = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))[0]
        raise ValueError(f"{place / PROJECTOR_FILE}: expected {key} of shape {wanted.get(key)}, got {found.get(key)}")
    return state


def load(path, described: dict, receiver: nn.Module, given: dict, trainable: bool, **model_options) -> dict:
    """{"others": those of a directory}, or {} where it has none.

    described: their part of agents.json. receiver: the team's model. given: by name, a loaded model, or a directory or hub
    name, where it is not the one that other.json names. trainable: whether their adapters are.
    """
    if unknown := sorted(given.keys() - described.keys()):
        raise ValueError(f"others: expected some of {sorted(described)}, got {unknown[0]!r}")
    others = {}
    for name, description in described.items():
        place = directory(path, name)
        head, model = _head(place), given.get(name)
        options = dict(description)
        kind = options.pop("projector")
        encodes = kind.get("kind") == ENCODER
        if model is None or isinstance(model, (str, os.PathLike)):
            source = model or head["base_model"]
            if not source:
                raise ValueError(f"others, {name!r}: expected a loaded model or a name, {place / OTHER_FILE} names none")
            model = (load_encoder if encodes else load_base)(source, **model_options)
        if encodes:
            model = encoder_of(model)
        file.check_base(head, model, place)
        model = file.load_adapters(place, model, head["adapters"], trainable)
        tokenizer = file.load_saved_tokenizer(place, **model_options) or load_tokenizer(head["base_model"], **model_options)
        try:
            others[name] = made(kind, model, tokenizer, receiver, **options)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{Path(path) / file.AGENTS_FILE}: others, {name!r}: {error}") from error
        state = _own_state(place, others[name])
        device = next(receiver.get_input_embeddings().parameters()).device
        for part, module in others[name].named_children():
            if dtypes := {x.dtype for key, x in state.items() if key.startswith(part + ".")}:
                module.to(device, dtypes.pop())
        others[name].load_state_dict(state, strict=False)
    return {"others": others} if others else {}
