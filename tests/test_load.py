"""Loading models by name: what comes out of a directory and of a GGUF file, and what is said where nothing does."""

import json
import shutil
import socket
import time
from types import SimpleNamespace

import pytest
import tiny_systems as tiny
import torch
from huggingface_hub import constants
from models import randomize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import peft

from diffmas import Agent, MultiAgentSystem
from diffmas.models.load import load_base, load_config, load_model, load_tokenizer
from diffmas.training import add_lora, lora_config

IDS = torch.tensor([[5, 9, 70, 71, 72]])
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"

# ---- GGUF ------------------------------------------------------------------------------------------------------------


def interleaved(weight, heads: int):
    """Rows of a llama projection as GGUF has them: each head's two halves take turns."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_gguf(path, quantized: bool = False):
    """A tiny random llama with a byte tokenizer as a GGUF file; returns the model."""
    gguf = pytest.importorskip("gguf")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]  # of GPT-2's byte tokens
    merges = ["a b", "c d", "ab cd"]
    words = ["<|end|>", *alphabet, *(m.replace(" ", "") for m in merges)]
    config = AutoConfig.for_model(
        "llama", vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = randomize(AutoModelForCausalLM.from_config(config)).eval()
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd",
        "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(config.to_dict().get("rope_theta") or config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3] + [1] * (len(words) - 1))  # control, normal
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, p in model.named_parameters():
        x = p.detach()
        if "q_proj" in name or "k_proj" in name:
            x = interleaved(x, 4 if "q_proj" in name else 2)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        kind = gguf.GGMLQuantizationType.Q8_0
        if quantized and x.dim() == 2:
            writer.add_tensor(name, gguf.quants.quantize(x.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, x.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file(tmp_path):
    file = tmp_path / "tiny.gguf"
    source = write_gguf(file)
    model, tokenizer = load_model(file, dtype="float32")
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, source(IDS).logits, atol=1e-5)
    assert tokenizer.decode(tokenizer("xabcd y", add_special_tokens=False)["input_ids"]) == "xabcd y"
    assert tokenizer("abcd", add_special_tokens=False)["input_ids"] == [259]  # one merged token
    assert tokenizer.eos_token_id == 0 and tokenizer.chat_template == TEMPLATE
    assert model.config._name_or_path == str(file) and not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, words = load_model(tmp_path / "saved", dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16 and words("xabcd y") == tokenizer("xabcd y")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())


def test_a_quantized_gguf_file_becomes_plain_weights(tmp_path):
    source = write_gguf(tmp_path / "tiny.gguf", quantized=True)
    model = load_base(tmp_path / "tiny.gguf", dtype=torch.float32)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear and model.dtype == torch.float32
    want = source.model.layers[1].self_attn.k_proj.weight
    gap = (model.model.layers[1].self_attn.k_proj.weight - want).abs().max() / want.abs().max()
    assert 1e-4 < gap < 1e-2  # of eight bits


@pytest.mark.filterwarnings("error:.*config file")  # PEFT looks for the base model's config beside the name
def test_a_system_on_a_gguf_file_is_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load_model("tiny.gguf")
    agents = [Agent("planner", "plan {question}", 2), Agent("solver", "{question}")]
    system = MultiAgentSystem(add_lora(model, config=lora_config(r=2)), tokenizer, agents).eval()
    with torch.no_grad():
        for name, p in system.named_parameters():
            if "lora_B" in name:
                p.normal_()
        want = system(["ab"], ["cd"]).loss
        system.save_pretrained(tmp_path / "out")
        monkeypatch.chdir(tmp_path / "out")  # the file's name in agents.json does not depend on where it was read
        assert torch.equal(MultiAgentSystem.from_pretrained(".").eval()(["ab"], ["cd"]).loss, want)


def test_a_config_takes_a_gguf_file(tmp_path):
    from diffmas.cli import build, config

    write_gguf(tmp_path / "tiny.gguf")
    agents = "[{name: planner, prompt: 'plan {question}', latent_steps: 1}, {name: solver, prompt: '{question}'}]"
    (tmp_path / "config.yaml").write_text(f"model: tiny.gguf\ndtype: bfloat16\nagents: {agents}\n")
    system = build.untrained_system(config.load(tmp_path / "config.yaml"))
    assert system.model.config._name_or_path == str(tmp_path / "tiny.gguf") and system.model.dtype == torch.bfloat16
    assert system(["ab"], ["cd"]).loss.isfinite()


@pytest.mark.parametrize("share", [0, 0.01, 0.2, 0.5, 0.98])
def test_a_cut_gguf_file_is_named(tmp_path, share):
    write_gguf(tmp_path / "tiny.gguf")
    cut(tmp_path / "tiny.gguf", share)
    with pytest.raises(ValueError, match=r"tiny.gguf: expected a whole file of weights, got a damaged one"):
        load_model(tmp_path / "tiny.gguf")


def test_a_gguf_file_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setattr("diffmas.models.load.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tiny.gguf': a GGUF file needs the package gguf: pip install gguf"):
        load_model(tmp_path / "tiny.gguf")


# ---- directories -----------------------------------------------------------------------------------------------------


def cut(file, share: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def copied(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copied")


def test_a_directory(base, monkeypatch):
    model, tokenizer = load_model(str(base), dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert (
        model.config._name_or_path == str(base)
        and tokenizer("where is")["input_ids"] == tiny.tokenizer()("where is")["input_ids"]
    )
    assert load_base(base).dtype == torch.float32 and load_base(base, device="meta").device.type == "meta"
    monkeypatch.chdir(base.parent)
    assert torch.equal(load_base(base.name).lm_head.weight, tiny.model().lm_head.weight)


def test_names_that_lead_nowhere(base, tmp_path, monkeypatch):
    for name in (tmp_path / "none", str(tmp_path / "none"), "./none", "a/b/c"):
        with pytest.raises(ValueError, match=f"^model '{name}': expected a directory, .* found no such directory$"):
            load_model(name)
    for name in (tmp_path / "none.gguf", "none.gguf", "./a/b/none.gguf"):
        with pytest.raises(ValueError, match="none.gguf': expected a GGUF file .*, found none"):
            load_model(name)
    with pytest.raises(ValueError, match="config.json': expected a directory, .* got another file"):
        load_model(base / "config.json")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ValueError, match="found no config.json in it; name one of its files: x.gguf"):
        load_model(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="expected a base model, found an adapter"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="dtype: expected 'auto'.* got 'float17'"):
        load_model(base, dtype="float17")


@pytest.fixture
def network(monkeypatch):
    """Connections to the hub as a test says: none, or one that nothing is asked over. -> who was asked for."""
    asked = []

    def connection(where, *args, **options):
        asked.append(where)
        if network.away:
            raise OSError("no network")
        return socket.socket()

    network = SimpleNamespace(asked=asked, away=True, known={})
    monkeypatch.setattr("diffmas.models.network.KNOWN", network.known)
    monkeypatch.setattr(socket, "create_connection", connection)
    monkeypatch.setattr("diffmas.models.network.getproxies", lambda: {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits for {seconds} seconds"))
    return network


def test_without_a_network_a_name_is_looked_for_in_the_cache_alone(network, monkeypatch, tmp_path):
    """At once, where huggingface_hub would try again for 23 seconds for each file."""
    for load in (load_tokenizer, load_base):
        with pytest.raises(ValueError, match=r"model 'org/name': expected .* found no such path, and the hub gives no"):
            load("org/name", cache_dir=tmp_path)
    assert set(network.asked) == {("huggingface.co", 443)}
    there = tmp_path / "models--org--name"
    base = tiny.save_base(there / "snapshots" / "c0ffee")
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("c0ffee")
    if not hasattr(peft, "maybe_load_adapters"):  # 4.56 asks for an adapter and for code of generate, whatever it is told
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
    model, tokenizer = load_model("org/name", cache_dir=tmp_path)
    assert len(tokenizer) == len(tiny.tokenizer())
    want = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(x, want[name]) for name, x in model.state_dict().items())


def test_with_a_network_the_hub_is_asked(network, monkeypatch):
    """As it was: nothing is said of the cache."""
    seen = []
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda **place: seen.append(place))
    network.away = False
    load_config("org/name")
    assert seen == [{"pretrained_model_name_or_path": "org/name"}] and len(network.asked) == 1
    load_config("org/name")
    assert len(network.asked) == 1  # just now
    network.away = True
    network.known.clear()
    load_config("org/name", local_files_only=False)
    assert seen[2] == {"pretrained_model_name_or_path": "org/name", "local_files_only": True}
    for endpoint in ("hf-mirror.com", "http://near:port"):
        with monkeypatch.context() as other:
            other.setattr(constants, "ENDPOINT", endpoint)
            load_config("org/name")
    load_config("org/name", force_download=True)
    load_config("org/name", proxies={"https": "http://near:1"})
    monkeypatch.setattr("diffmas.models.network.getproxies", lambda: {"https": "http://near:1"})
    load_config("org/name")
    assert len(network.asked) == 2 and not any(place.get("local_files_only") for place in seen[3:])


def test_a_name_that_the_hub_does_not_have(monkeypatch):
    """local_files_only is the hub without a network: what it has is what was downloaded before."""
    for name in ("nobody/nothing", "nobody/nothing/none.gguf"):
        with pytest.raises(ValueError) as raised:
            load_model(name, local_files_only=True)
        said = str(raised.value)
        assert said.startswith(f"model '{name}': expected a directory, a .gguf file or a hub name, found no such path")
        assert "and the hub gives no" in said and "\n" not in said


def test_what_is_damaged_or_missing_in_a_directory_is_named(base, tmp_path):
    def without_a_weight(path):
        weights = load_file(path / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, path / "model.safetensors", {"format": "pt"})

    def of_another_shape(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))

    cases = {
        "config.json' is not a valid JSON": lambda path: cut(path / "config.json", 0.5),
        "model.safetensors: expected a whole file of weights, got a damaged one": lambda path: cut(
            path / "model.safetensors", 0.9
        ),
        "found no model.layers.1.mlp.up_proj.weight": without_a_weight,
        "got model.layers.0.mlp.down_proj.weight of another shape than its config says": of_another_shape,
        "no file named .*model.safetensors": lambda path: (path / "model.safetensors").unlink(),
        "expected a tokenizer beside the model, found none": lambda path: [f.unlink() for f in path.glob("*token*")],
        "expected a tokenizer that transformers can load, got: ": lambda path: cut(path / "tokenizer.json", 0.5),
        "got one of type 't5'": lambda path: (path / "config.json").write_text('{"model_type": "t5"}'),
        "model type `cube`": lambda path: (path / "config.json").write_text('{"model_type": "cube"}'),
    }
    for i, (said, damage) in enumerate(cases.items()):
        path = shutil.copytree(base, tmp_path / str(i))
        damage(path)
        with pytest.raises(ValueError, match=said) as raised:
            load_model(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value), str(raised.value)


def test_a_tokenizer_alone(base):
    assert load_tokenizer(base, attn_implementation="eager").eos_token == "<end>"
