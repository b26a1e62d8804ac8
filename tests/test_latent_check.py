"""Latent steps that no token is like are told, with what to try."""

import pytest
import tiny_systems as tiny
import torch

from diffmas.agents import latent_check
from diffmas.agents.latent_check import unlike_tokens

QUESTION = {"question": "where is the key"}


@pytest.mark.parametrize("realign", ["norm", "ridge", "learned"])
def test_a_tokens_norm_is_fine(realign):
    assert unlike_tokens(tiny.system(realign=realign), QUESTION) == []


def test_another_norm_is_told_with_what_gives_a_tokens():
    """The final norm gives h a norm of 4 here, and a token's embedding has one of 1."""
    (line,) = unlike_tokens(tiny.system(realign="none"), QUESTION)
    assert "times a token's norm; try realign='ridge' or 'norm'" in line and "instead of 'none'" in line
    low, high = float(line.split()[3]), float(line.split()[5])
    assert 3 < low <= high < 5
    (line,) = unlike_tokens(tiny.system(realign="soft_token", temperature=50.0), QUESTION)
    assert f"a mean of up to {len(tiny.VOCAB)} tokens: try a lower temperature than 50, as 0.5" in line
    assert unlike_tokens(tiny.system(realign="soft_token", temperature=0.01), QUESTION) == []


def test_less_sure_than_at_any_token_is_told(monkeypatch):
    monkeypatch.setattr(latent_check, "LESS_SURE", -9.0)
    (line,) = unlike_tokens(tiny.system(), QUESTION)
    assert "nats, in the prompt of at most" in line and "'ridge'" in line


def test_turns_that_nobody_reads_are_told():
    options = dict(latent_steps=0, trace_content="latent_only")
    (line,) = unlike_tokens(tiny.system(**options), QUESTION)
    assert "T = 0 with trace_content='latent_only': nobody reads planner, critic" in line
    assert unlike_tokens(tiny.system(no_latents="skip", **options), QUESTION) == []
    assert unlike_tokens(tiny.system(latent_steps=0), QUESTION) == []


def test_the_system_stays_as_it_was():
    system = tiny.system(realign="none").train()
    before, state = tiny.trainable(system), torch.get_rng_state()
    unlike_tokens(system, QUESTION)
    assert system.training and system.realign.training and not system.realign._forward_hooks
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert all(torch.equal(p, before[name]) for name, p in tiny.trainable(system).items())
    with pytest.raises(ValueError, match="question"):
        unlike_tokens(system, {})
    assert not system.realign._forward_hooks
