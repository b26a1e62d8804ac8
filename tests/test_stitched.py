"""Stitched agents as a method."""

import pytest
import systems
import tiny_systems as tiny
import torch
import torch.nn.functional as F
from models import assert_close, gradients
from test_evaluation import ANSWERS, QUESTIONS
from transformers import TrainingArguments

from diffmas import Trainer
from diffmas.evaluation import Stitched, stitch


def stitched_logits(system, question, answer):
    """The logits of the answer's tokens [A, V] without a trace: one context, in which an agent sees its own tokens alone and
    the last one all that was handed on. Moving an agent's block moves nothing in it, for RoPE is relative."""
    base, model, fields = systems.body(system.model), system.model, {"question": question}
    embed, blocks = base.get_input_embeddings(), []
    for agent in system.agents[:-1]:
        x = embed(torch.tensor(system.prompt_ids(agent, fields)))
        prompt = len(x)
        for _ in range(agent.latent_steps):
            h = base(inputs_embeds=x[None], use_cache=False).last_hidden_state[0, -1:]
            x = torch.cat((x, system.realign(h)))
        blocks.append((x, prompt))
    target = system.answer_ids(answer)
    blocks.append((embed(torch.tensor(system.prompt_ids(system.agents[-1], fields) + target)), 0))
    x = torch.cat([block for block, _ in blocks])
    owner = torch.tensor([i for i, (block, _) in enumerate(blocks) for _ in block])
    only_latent = system.trace_content == "latent_only"
    handed = torch.tensor([not only_latent or t >= prompt for block, prompt in blocks for t in range(len(block))])
    last = owner == len(blocks) - 1
    sees = ((owner[:, None] == owner) | (last[:, None] & handed)).tril()
    mask = torch.zeros(len(x), len(x), dtype=x.dtype).masked_fill(~sees, torch.finfo(x.dtype).min)
    where, positions = 0, []  # of what is handed on, without gaps; a prompt that is not stands before its latent steps
    for block, prompt in blocks:
        kept = prompt if only_latent else 0
        positions += range(where - kept, where - kept + len(block))
        where += len(block) - kept
    positions = torch.tensor(positions)
    logits = model(
        inputs_embeds=x[None], attention_mask=mask[None, None], position_ids=positions[None] + 100, use_cache=False
    ).logits[0]  # fmt: skip
    return logits[-len(target) - 1 : -1]


@pytest.mark.parametrize("content", ["all", "latent_only"])
def test_stitched_agents_equal_one_masked_context(content):
    from systems import ANSWERS, QUESTIONS

    s = systems.system(trace_content=content, sinks=0)
    method = stitch(s, adapter=True)
    team = method.system
    out = team(QUESTIONS, ANSWERS)
    total, count = 0.0, 0
    for b, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS)):
        want = stitched_logits(team, question, answer)
        assert_close(out.logits[b, : len(want)], want)
        total = total + F.cross_entropy(want, torch.tensor(team.answer_ids(answer)), reduction="sum")
        count += len(want)
    assert abs((out.loss - systems.unrolled_loss(s, QUESTIONS, ANSWERS)).item()) > 1e-4  # agents that read each other
    out.loss.backward()
    got = gradients(team)
    (total / count).backward()
    assert_close(got, gradients(team))
    assert method.loss(QUESTIONS, ANSWERS)[0] == pytest.approx(total.item(), rel=1e-5)
    generated = team.generate_tokens(QUESTIONS, max_new_tokens=3, temperature=0)
    assert [row[0][0] for row in generated] == [int(team([q]).logits[0, 0].argmax()) for q in QUESTIONS]


def test_stitched_agents_are_trained_as_others_are(tmp_path):
    system = tiny.system()
    team = Stitched(system.model, system.tokenizer, system.agents)
    before = tiny.trainable(team)
    arguments = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(team, arguments, train_dataset=tiny.rows(4)).train()
    assert all(not torch.equal(before[name], p) for name, p in tiny.trainable(team).items())
    alone = Stitched(system.model, system.tokenizer, system.agents[-1:])
    assert alone(QUESTIONS, ANSWERS).loss.isfinite()  # nobody to be joined
