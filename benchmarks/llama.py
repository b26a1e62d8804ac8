"""llama.cpp as a peer of whole models: a Llama's weights as a GGUF file, and its decoding, by llama-cpp-python's low level.

Its weights and products are in the file's type, its K/V in float32 beside float32 weights and else in its own default, float16.
"""

import ctypes
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from diffmas.benchmarks.measure import Cannot

__all__ = ["Decoder", "write_gguf"]

PREFILL = 512  # tokens of a batch


def write_gguf(model: LlamaForCausalLM, path: Path, kind: str) -> None:
    """A Llama with tied embeddings as a file without a tokenizer. kind: "F32", "BF16" or "F16", of all matrices."""
    import gguf

    config, kinds = model.config, gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.named_parameters():
        rows = weight.detach().float()
        for projection, count in heads.items():
            if projection in name:  # its RoPE turns neighbours, not halves
                rows = rows.view(count, 2, -1, rows.shape[1]).transpose(1, 2).reshape_as(rows)
        type_ = kinds[kind] if rows.dim() == 2 else kinds.F32
        packed = gguf.quants.quantize(rows.numpy(), type_)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), packed, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Decoder:
    """A model in llama.cpp with `batch` sequences, on as many threads as torch has.

    kind: see `write_gguf`. capacity: tokens of a sequence at most. flash: whether by its flash attention. Raises Cannot where
    llama-cpp-python or gguf is not installed.
    """

    def __init__(self, model: LlamaForCausalLM, kind: str, batch: int, capacity: int, flash: bool):
        try:
            import gguf  # noqa: F401
            import llama_cpp
        except ImportError as error:
            raise Cannot(f"{error.name} is not installed") from None
        self.lib, self.batch, self.vocabulary = llama_cpp, batch, model.config.vocab_size
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, kind)
            options = llama_cpp.llama_model_default_params()
            options.use_mmap = False
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise Cannot("llama.cpp does not load the model")
        weakref.finalize(self, llama_cpp.llama_model_free, self.model)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.kv_unified = batch * -(-capacity // 256) * 256, batch, False
        options.n_batch = options.n_ubatch = PREFILL
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.flash_attn_type = int(flash)
        options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32 if kind == "F32" else llama_cpp.GGML_TYPE_F16
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise Cannot("llama.cpp makes no context")
        weakref.finalize(self, llama_cpp.llama_free, self.context)  # before the model: the last one made is the first to go
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.tokens = llama_cpp.llama_batch_init(max(PREFILL, batch), 0, 1)

    def forward(self, tokens: list[tuple[int, int, int]], logits: int) -> None:
        """tokens: (id, position, sequence), at most PREFILL of them; the last `logits` of them get logits."""
        for i, (token, position, sequence) in enumerate(tokens):
            self.tokens.token[i], self.tokens.pos[i] = token, position
            self.tokens.n_seq_id[i], self.tokens.seq_id[i][0] = 1, sequence
            self.tokens.logits[i] = i >= len(tokens) - logits
        self.tokens.n_tokens = len(tokens)
        status = self.lib.llama_decode(self.context, self.tokens)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def logits(self, count: int) -> Tensor:
        """Of the last forward, [count, V]."""
        pointer = self.lib.llama_get_logits(self.context)
        return torch.frombuffer(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * (count * self.vocabulary)))[0],
                                dtype=torch.float32).view(count, -1).clone()  # fmt: skip

    def start(self, ids: list[int]) -> None:
        """All sequences begin with these tokens, each with rows of its own."""
        self.lib.llama_memory_clear(self.memory, False)
        for first in range(0, len(ids), PREFILL):
            part = ids[first : first + PREFILL]
            self.forward([(token, first + i, 0) for i, token in enumerate(part)], 1)
        for sequence in range(1, self.batch):
            self.lib.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)

    def rewind(self, length: int) -> None:
        """Every sequence is again so long."""
        for sequence in range(self.batch):
            self.lib.llama_memory_seq_rm(self.memory, sequence, length, -1)
