"""Teams inside of vLLM: the plugin that vLLM loads (`vllm.general_plugins`), and what a user of it calls.

A question is one request: the prompts of all agents one after another, with a stand-in token where a latent step's vector goes
in. The engine never runs past a vector that it has not computed yet, so a latent step is the first token of a chunk of that
prompt; everything else (batching, prefix cache, preemption, sampling) is vLLM's own.

course      where in such a prompt the agents have their turns; knows no engine
teams       checks teams before an engine starts; its options, and requests
limits      what of an engine's settings does not go with teams
scheduling  in the engine's core: where a chunk of a prompt ends, and what its cached blocks are called
latents     in the worker: vectors in, hidden states out, an adapter for each agent's tokens
runner_v1   where vLLM's model runner V1 has these; runner_v2 likewise
plugin      puts these into vLLM
chat        vLLM's handler of /v1/chat/completions, for teams; server: vLLM's own server with it (`diffmas serve`)
"""
