"""Conversations as texts: which characters are answers, and bad templates."""

import pytest

from tests.tasks.decoder_files import tokenizer_of_words
from vera_jax.data import chat
from vera_jax.errors import UserError

TEMPLATE = (
  "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>\n{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TAGGED = (
  "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
  "{% generation %}{{ m.content }}<end>\n{% endgeneration %}{% else %}"
  "{{ m.content }}<end>\n{% endif %}{% endfor %}"
)
MESSAGES = [
  {"role": "system", "content": "é"},
  {"role": "user", "content": "one\n"},
  {"role": "assistant", "content": "zwei ☃"},
  {"role": "user", "content": "three"},
  {"role": "assistant", "content": "vier"},
]


def with_template(template):
  tokenizer = tokenizer_of_words()
  tokenizer.chat_template = template
  return tokenizer


def answers(template, messages=MESSAGES):
  text, spans, _ = chat.render_conversation(with_template(template), messages)
  return text, [text[first:last] for first, last in spans]


def test_answers_are_found_with_tags_and_without():
  found = answers(TEMPLATE)
  assert found[1] == ["zwei ☃<end>\n", "vier<end>\n"]
  assert answers(TAGGED) == found
  ids = chat.message_ids(with_template("{{ messages[0].content }}"), "word3")
  assert ids == [6]


def test_a_conversation_that_changes_as_it_goes_on_is_refused():
  for template in ("{{ messages|length }}", "{{ messages[-1].content }}"):
    with pytest.raises(UserError, match="place is not known.*They part at"):
      answers(template)


@pytest.mark.parametrize(
  "template, message",
  [
    ("{% if %}", "can't be used: Expected an expression"),
    ("{{ ''.__class__.mro() }}", "'__class__' of 'str' object is unsafe"),
    ("{{ 'x' * 1002001 }}", "of 20 characters.* of 1,002,001; 1,002,000 are"),
    ("{{ 'x' * 10**11 }}", "can't be used: it fills the memory"),
    (None, "no chat template.*data.template=alpaca.*--template=alpaca"),
  ],
)
def test_a_template_that_fails_says_why(template, message):
  with pytest.raises(UserError, match=message):
    answers(template)


def test_a_template_without_end_is_stopped_and_others_go_on(monkeypatch):
  monkeypatch.setattr(chat, "SECONDS", 0.1)
  numbers = "{% for a in range(99999) %}"
  loop = 3 * numbers + 3 * "{% endfor %}"
  with pytest.raises(UserError, match="it takes more than 0.1 seconds"):
    answers(loop)
  # one operation, which only ends with the process
  with pytest.raises(UserError, match="it takes more than 0.2 seconds"):
    answers("{{ 10 ** (10 ** 9) }}")
  assert answers(TEMPLATE)[1][1] == "vier<end>\n"


def test_an_interrupted_request_leaves_no_answer_for_the_next(monkeypatch):
  answers(TEMPLATE)
  child = chat._PROCESS._child

  def interrupted():
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(child.stdout, "readline", interrupted)
    with pytest.raises(KeyboardInterrupt):
      answers("another text")
  assert child.poll() is not None
  assert answers(TEMPLATE)[1][1] == "vier<end>\n"


def test_half_an_answer_is_the_end_of_the_process(monkeypatch, tmp_path):
  script = tmp_path / "dies.py"
  script.write_text(
    "import os\ninput()\nprint('{\"text\": \"a', end='', flush=True)\n"
    "os.kill(os.getpid(), 9)\n"
  )
  monkeypatch.setattr(chat, "_SCRIPT", script)
  assert "ended with the code -9" in chat._Process().ask({})["error"]


@pytest.mark.parametrize(
  "template, text",
  [
    ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
    (
      "  {% if strftime_now is defined %}\n{% set a = strftime_now('%B %y') %}"
      "{{ a.upper() }} {{ a }}{% else %}never{% endif %}",
      "JULY 24 July 24",
    ),
  ],
)
def test_a_date_is_the_same_on_any_day(template, text):
  for prompt in (False, True):
    found = chat._render(with_template(template), MESSAGES, prompt=prompt)
    assert found.text == text


def test_tags_are_where_they_were_behind_a_date():
  dated = "{{ strftime_now('%Y') }}" + TAGGED
  text, own = answers(TAGGED)
  assert answers(dated) == ("2024" + text, own)


def test_a_process_that_fails_says_why(monkeypatch, tmp_path):
  (tmp_path / "transformers.py").write_text("raise OSError('no such disk')")
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  monkeypatch.setattr(chat, "_PROCESS", chat._Process())
  with pytest.raises(UserError, match="be imported: OSError..no such disk"):
    answers(TEMPLATE)
  chat._PROCESS.end()
