"""Text agents that are trained."""

import pytest
import tiny_systems as tiny
from test_evaluation import ANSWERS, GREEDY, QUESTIONS
from transformers import TrainingArguments

from diffmas import Agent, MultiAgentSystem, Trainer
from diffmas.agents.file import add_adapter
from diffmas.evaluation import Latent, Scorer, TextAgents, Writers, right_turns


def test_right_turns_are_what_right_samples_wrote():
    system = tiny.system()
    team, scorer = TextAgents(system, 25), Scorer("(kitchen|cellar|garden|attic|garage)")
    options = dict(max_new_tokens=25, temperature=5.0, top_p=1.0, seed=1)
    rows = right_turns(team, tiny.rows(4), 40, scorer, batch_size=2, **options)
    turns, answers = team.write(QUESTIONS, 40, **options)
    want = []
    for i, text in enumerate(text for texts in answers.texts for text in texts):
        if scorer.correct(text, ANSWERS[i // 40]) and all(turn.lengths[i] < 25 for turn in turns):
            want += [{"agent": t.agent.name, "prompt": t.prompts[i], "answer": t.texts[i]} for t in turns]
    assert rows == want and [row["agent"] for row in rows[:3]] == ["planner", "critic", "solver"]
    with pytest.raises(ValueError, match="got 0 right and [1-9][0-9]* that ended by themselves of 160"):
        right_turns(team, [{**row, "answer": "nowhere"} for row in tiny.rows(4)], 40, **options)
    with pytest.raises(ValueError, match="and 0 that ended by themselves"):
        right_turns(TextAgents(system, 1), tiny.rows(4), 40, scorer, **options)


def test_text_agents_learn_from_their_right_turns(tmp_path):
    """What a role is trained on is what it reads: each with its own system message. Then the team has the adapter by name."""
    crew = [Agent("planner", "plan : {question}", system="notes"), Agent("solver", "question : {question} answer :")]
    system = MultiAgentSystem(tiny.model(), tiny.tokenizer(), crew)
    rows = [
        {"agent": "planner", "prompt": "plan : where is the key", "answer": "in the garden"},
        {"agent": "solver", "prompt": "planner: in the garden\n\nquestion : where is the key answer :", "answer": "the attic"},
    ]
    writers = Writers(system.model, system.tokenizer, crew)
    reads = MultiAgentSystem(system.model, system.tokenizer, crew[:1]).prompt_ids(crew[0], {"question": "where is the key"})
    assert writers.prompt_ids(writers.agents[0], rows[0]) == reads != system.tokenizer(rows[0]["prompt"])["input_ids"]
    with pytest.raises(ValueError, match=r"questions\[0\], agent: expected one of \['planner', 'solver'\], got 'critic'"):
        writers([{**rows[0], "agent": "critic"}], ["in the garden"])
    arguments = TrainingArguments(
        str(tmp_path), max_steps=60, learning_rate=3e-2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        logging_strategy="no",
    )  # fmt: skip
    Trainer(writers, arguments, train_dataset=rows).train()
    writers.save_pretrained(tmp_path / "sft")

    other = tiny.system()  # with an adapter of its own
    team = MultiAgentSystem(add_adapter(tmp_path / "sft", other.model, "sft"), tiny.tokenizer(), crew)
    own = Latent(other).loss(QUESTIONS, ANSWERS)
    trained = TextAgents(team, 6, adapter="sft").answer(["where is the key"], **GREEDY)
    assert trained.texts == [["the attic"]]
    assert TextAgents(team, 6).answer(["where is the key"], **GREEDY).texts != trained.texts
    assert Latent(other).loss(QUESTIONS, ANSWERS) == own  # the first adapter is still the active one
    with pytest.raises(ValueError, match=r"adapter: expected True, False or one of \['default', 'sft'\], got 'sftt'"):
        TextAgents(team, 6, adapter="sftt")
    bare = add_adapter(tmp_path / "sft", tiny.model(), "sft")
    alone = MultiAgentSystem(bare, tiny.tokenizer(), crew)
    assert TextAgents(alone, 6, adapter="sft").answer(["where is the key"], **GREEDY).texts == trained.texts
    with pytest.raises(ValueError, match="expected agents of this base model"):
        add_adapter(tmp_path / "sft", tiny.model(seed=9), "sft")
    tiny.system(adapter_scope="per_role").save_pretrained(tmp_path / "roles")
    with pytest.raises(ValueError, match="expected one adapter that all agents share, got .*'critic'"):
        add_adapter(tmp_path / "roles", tiny.model(), "roles")
