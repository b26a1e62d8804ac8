"""Tiny teams on disk, an engine that has them, and what our own loop says to the same questions."""

import gc

import tiny_systems as tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from diffmas import MultiAgentSystem, Trace
from diffmas.serving.team import Question, Settings, Team
from diffmas.serving.vllm.teams import Teams
from diffmas.training import add_lora, lora_config

ANSWER = 12  # tokens at most
BLOCK = 32  # of the prefix cache: the least that the CPU takes
# realign, adapter_scope, whether there is LoRA
CREWS = {
    "bare": ("norm", "shared", False), "shared": ("ridge", "shared", True), "roles": ("learned", "per_role", True),
    "final": ("soft_token", "final_only", True),
}  # fmt: skip
QUESTIONS = ("where is the key", "where is the lamp answer notes key", "book", "where is the map in the attic")
STEPS = ({"planner": 4, "critic": 9}, {"planner": 0, "critic": 4}, {"planner": 9, "critic": 0}, 0)
MIXED = [(text, T) for text in QUESTIONS for T in STEPS]


def save_base(path, kind: str = "qwen3", seed: int = 0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tiny.VOCAB), hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, initializer_range=0.25, max_position_embeddings=512, eos_token_id=2, pad_token_id=0,
        bos_token_id=None, tie_word_embeddings=kind == "qwen2", **({"sliding_window": None} if kind == "mistral" else {}),
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def save_crew(path, base, realign: str, scope: str, lora: bool, seed: int = 3, **options):
    """Adapters with a B that is not zero, and a learned map that is not where it began."""
    model, agents = AutoModelForCausalLM.from_pretrained(base), tiny.agents(4, 9)
    generator = torch.Generator().manual_seed(seed)
    model = add_lora(model, agents, scope, lora_config(r=2, alpha=4)) if lora else model
    system = MultiAgentSystem(model, tiny.tokenizer(), agents, realign=realign, adapter_scope=scope, **options)
    with torch.no_grad():
        for name, p in system.named_parameters():
            if "lora_B" in name:
                p.copy_(0.15 * torch.randn(p.shape, generator=generator))
            if name == "realign.weight":
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
    system.save_pretrained(path)
    return path


def question(team: Team, text: str, T, limit: int = ANSWER) -> Question:
    return team.question({"question": text}, Settings(temperature=0), limit, 0, T)


class Ours:
    """The teams in our own loop."""

    def __init__(self, directories):
        self.teams = {name: Team(name, MultiAgentSystem.from_pretrained(path)) for name, path in directories.items()}

    @torch.no_grad()
    def __call__(self, name: str, text: str, T, limit: int = ANSWER) -> list[int]:
        asked = question(self.teams[name], text, T, limit)
        system = asked.team.system
        trace = system.communicate([asked.fields], Trace(system.model), [[turn] for turn in asked.turns])
        return system.generate_tokens([asked.fields], limit, temperature=0, trace=trace)[0][0]


class Engine:
    """vLLM with teams. options: of `vllm.LLM`."""

    def __init__(self, directories, **options):
        from vllm import LLM

        self.teams = Teams(directories)
        given = {
            "dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, "max_model_len": 256, "block_size": BLOCK,
            "skip_tokenizer_init": True, "disable_log_stats": False,
        }  # fmt: skip
        self.llm = LLM(**self.teams.engine_options(), **{**given, **options})

    def request(self, name: str, text: str, T, limit: int = ANSWER):
        prompt, params = self.teams.request(question(self.teams[name], text, T, limit))
        params.detokenize = False
        return prompt, params

    def __call__(self, asked: list[tuple]):
        """asked: (team, text, T), or a prompt and its params. -> vLLM's outputs, in their order, side by side in one engine."""
        requests = [self.request(*one) if isinstance(one[0], str) else one for one in asked]
        return self.llm.generate(*map(list, zip(*requests)), use_tqdm=False)

    def tokens(self, asked: list[tuple]) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in self(asked)]

    @property
    def core(self):
        return self.llm.llm_engine.engine_core.engine_core

    def forget(self) -> None:
        """Empties the prefix cache."""
        assert self.llm.reset_prefix_cache()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
