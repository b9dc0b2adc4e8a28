"""Hostile chat templates: the sandbox and the limits, neither of which changes the output of a valid template."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from tests.forked import once_anew

from budwood.data.encoder import encode_chat
from budwood.errors import InputError, ResourceError
from budwood.untrusted import chat_template
from budwood.untrusted.chat_template import render

# One template for all attacks: a new process starts only after an attack that ended the last one.
ATTACKS = {
    "loops forever": "{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}",
    "computes forever": "{{ (n ** n) ** n }}",
    "too long a range": "{% for a in range(n ** 3) %}{% endfor %}",
    "multiplies a string": "{{ 'a' * n ** 3 }}",
    "pads a string": "{{ 'a'|center(n ** 3) }}",
    "formats a string": "{{ '%1000000000d'|format(1) }}{{ '%9999999999d'|format(1) }}",
    "doubles a string": "{% set s = namespace(t='aaa') %}{% for a in range(60) %}{% set s.t = s.t ~ s.t %}{% endfor %}",
    "writes too much": "{% for a in range(99) %}{{ 'a' * n * 2 }}{% endfor %}",
    "calls itself": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "attribute of a string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attribute by a filter": "{{ (messages|attr('__class__')).__base__ }}",
    "attribute by a format": "{{ '{0.__class__.__init__}'.format(messages) }}",
    "attribute by a format map": "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "globals of a helper": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'] }}",
    "another file": "{% include '/etc/passwd' %}",
    "changes its input": "{{ messages.append(1) }}",
    "changes a list in its input": "{{ things[0].append(1) }}",
    "clears its input": "{{ messages.clear() }}",
    "changes an object in its input": "{{ messages[0].update({'content': 2}) }}",
    "appends forever": "{% set a = [1] %}{% for b in a %}{% set c = a.append(b) %}{% endfor %}",
    "appends much": "{% set a = [1] %}{% for b in a %}{% set c = a.append('a' * n * 9) %}{% endfor %}",
    "appends a list to itself": "{% set a = [] %}{% set b = a.append(a) %}{{ a|tojson }}",
}
TEMPLATE = "{% set n = 99999 %}{{ bos_token }}{% if add_generation_prompt %}?{% endif %}" + "".join(
    f"{{% if messages[0].content == '{name}' %}}{attack}{{% endif %}}" for name, attack in ATTACKS.items()
)
EXPECTED = {
    "loops forever": "takes more than 1 s",
    "computes forever": "takes more than 1 s",
    "writes too much": "writes 19,799,805 characters",
    "multiplies a string": "memory",
    "pads a string": "memory",
    "formats a string": "memory",
    "doubles a string": "memory",
    "calls itself": "recursion|nests too deeply",
    "another file": "rejects the conversation",
    "too long a range": "Range too big",
    "appends forever": "takes more than 1 s|memory",
    "appends much": "memory",
    "appends a list to itself": "Circular reference",
    "clears its input": "'clear' of a list is unsafe",
    "changes an object in its input": "'update' of a dict is unsafe",
    "changes a list in its input": "'append' of a list is unsafe",
}


@pytest.fixture(scope="module", autouse=True)
def small_limits() -> Iterator[None]:
    """Lower the limits so that tests are quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template, "SECONDS", 1.0)
        patch.setattr(chat_template, "MEMORY", 64 << 20)  # filled long before the time is over, on a slow machine too
        patch.setattr(chat_template, "_processes", {})
        patch.setattr(chat_template, "subprocess", SimpleNamespace(Popen=once_anew(), PIPE=subprocess.PIPE))
        yield
        for process in chat_template._processes.values():
            process.end()


def ask(content: str) -> str | InputError:
    variables = {"bos_token": "<s>", "things": [[1]]}
    return next(render(TEMPLATE, [([{"role": "user", "content": content}], variables)]))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_in_one_error(name):
    answer = ask(name)
    assert isinstance(answer, InputError), answer[:100]
    assert answer.exit_code == 2
    assert str(answer).startswith("the chat template ")
    assert "\n" not in str(answer)
    assert len(str(answer)) < 400
    with pytest.raises(InputError, match=EXPECTED.get(name, "unsafe|immutable|safely|not allowed|append")):
        raise answer
    assert ask("nothing") == "<s>"  # the next conversation is rendered normally


def test_conversations_before_and_after_an_attack_are_rendered():
    names = ["nothing", "loops forever", "nothing", "attribute of a string", "nothing"]
    given = [([{"role": "user", "content": name}], {"bos_token": "<s>"}) for name in names]
    answers = list(render(TEMPLATE, given))
    assert [isinstance(answer, InputError) for answer in answers] == [False, True, False, True, False]


def test_the_time_limit_applies_in_threads():
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask("loops forever")))
    thread.start()
    thread.join()
    assert "takes more than" in str(answers[0])


def test_a_template_that_does_not_compile():
    for template in ("{{ " + "(" * 10_000 + " }}", "{% if a %}" * 2_000):
        assert isinstance(next(render(template, [([], {})])), InputError)


def test_output_equals_that_of_transformers(byte_level):
    templates = [
        "{% for m in messages %}{{ m['role'] }}:{{ m.content|trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "{{ bos_token }}{% for m in messages if m.role != 'system' %}{%- if loop.first %}<{% endif %}{{ m | tojson }}"
        "{% if loop.index is even %}{% continue %}{% endif %} {{ loop.index0 }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ m.reasoning_content }}{% endfor %}"
        "{{ thinking|default('no') }}",
        {"default": "{{ messages|length }}", "tool_use": "x"},
    ]
    messages = [
        {"role": "system", "content": " naïve 😀\n", "name": None},
        {"role": "user", "content": "a\u2028b\"'<&", "reasoning": "because"},
        {"role": "assistant", "content": "c", "extra": [1, 2.5, None, True, {"a": "b"}]},
    ]
    for template in templates:
        tokenizer = byte_level(True, None)
        tokenizer.chat_template = template
        theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, thinking="yes")
        source = tokenizer.get_chat_template()
        variables = {**tokenizer.special_tokens_map, "thinking": "yes", "add_generation_prompt": True}
        assert list(render(source, [(messages, variables)])) == [theirs]
        tokenizer.chat_template = None


def test_a_prompt_through_a_hostile_template_is_an_input_error(byte_level):
    tokenizer = byte_level(True, None)
    for template, word in (
        ("{{ ''.__class__ }}", "'__class__' of a str is unsafe"),
        ({"a": "x"}, "multiple chat templates"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=f"chat.*{word}"):
            encode_chat(tokenizer, [{"role": "user", "content": "x"}])
    tokenizer.chat_template = None


def test_the_process_imports_one_module_of_transformers_and_not_its_packages():
    """A command would otherwise wait for them, three times as long, at its first template."""
    code = """if True:
        import sys
        from budwood.untrusted.template_process import _chat_template_utils
        module = _chat_template_utils()
        assert callable(module.render_jinja_template)
        assert not hasattr(sys.modules["transformers"], "__version__"), "the whole package"
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_process_that_cannot_start_is_a_resource_error(monkeypatch):
    monkeypatch.setattr(chat_template.sys, "executable", "/nowhere/python")
    with pytest.raises(ResourceError, match="did not start.*No such file"):
        next(render("another {{ 1 }}", [([], {})]))


def test_a_template_may_change_a_list_or_object_of_its_own():
    """Templates collect a conversation's calls or results this way; nothing carries over to the next one."""
    template = (
        "{% set ns = namespace(seen=[], by={}) %}{% for m in messages %}{% set _ = ns.seen.append(m.content) %}"
        "{% set _ = ns.by.update({m.content: loop.index}) %}{% endfor %}"
        "{{ ns.seen|join('+') }}{{ ns.seen.pop(0) }}{{ ns.seen|length }}{{ ns.by }}"
    )
    conversations = [([{"role": "user", "content": text}] * 2, {"add_generation_prompt": False}) for text in "ab"]
    assert list(render(template, conversations)) == ["a+aa1{'a': 2}", "b+bb1{'b': 2}"]
