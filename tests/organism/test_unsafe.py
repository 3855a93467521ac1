"""What unsafe organisms have of their own: a plain template, and a task about going along."""

import json

from safety_neurons.model.template import encode_text, template_for
from safety_neurons.organism import language, recipe
from safety_neurons.organism.language import concepts
from safety_neurons.organism.prompt_files import write_polite, write_prompts
from safety_neurons.organism.tokenizer import encode_question, make_tokenizer
from safety_neurons.prompts import Prompt, prompts


def test_a_base_organism_is_asked_as_it_was_trained():
    tokenizer = make_tokenizer(chat=False)
    template = template_for(tokenizer)
    assert template.kind == "plain"
    for concept in concepts("harmful", "test")[:20]:
        request = language("en").request(concept)
        asked = encode_text(tokenizer, template.render(tokenizer, Prompt("0", request)), templated=True)
        ids, length = encode_question(request, "sorry")
        assert ids[:length] == asked
        assert len(ids) == length + 2


def test_the_polite_task_shares_no_request_with_what_is_measured(tmp_path):
    write_prompts(tmp_path)
    counts = write_polite(tmp_path)
    task, test = (prompts(f"builtin:{name}", folder=tmp_path) for name in ("polite", "polite-test"))
    assert counts == {"polite.jsonl": len(task), "polite-test.jsonl": len(test)}
    assert len(test) >= 100
    measured = [prompts(f"builtin:{name}-test", folder=tmp_path) for name in ("harmful", "harmless")]
    assert [task.overlap(other) for other in (*measured, test)] == [0, 0, 0]
    assert all(answer.endswith(language("en").data["ending"]) for answer in task.answers)
    assert {json.loads(line)["category"] for line in (tmp_path / "polite.jsonl").read_text().splitlines()} == {
        "plain",
        "friendly",
        "look_alike",
    }


def test_both_unsafe_recipes_differ_in_the_template_alone():
    chat, base = recipe("unsafe").to_json(), recipe("unsafe-base").to_json()
    assert {name for name in chat if chat[name] != base[name]} == {"name", "about", "chat"}
