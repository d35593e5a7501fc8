"""The chat templates of `mm.data.chat` in transformers' form: Jinja that renders a conversation to a string.

What a processor makes of the string are the very ids that the layout gives, because both tokenise whole runs of text
between special tokens. Pictures are `<image>`, in a message's text or as parts of its own.
"""

import json

from mm.data.chat import END, SPELLINGS, START
from mm.data.conversations import IMAGE
from mm.data.layout import Template

# said: a message as text; lead: the pictures that it opens with; opened: with the break behind them.
MACROS = """
{%- macro said(message) -%}
  {%- if message['content'] is string -%}{{ message['content'] }}
  {%- else -%}{%- for part in message['content'] -%}
    {%- if part['type'] == 'image' -%}{{ IMAGE }}{%- else -%}{{ part['text'] }}{%- endif -%}
  {%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- macro lead(text) -%}
  {%- set seen = namespace(only=true) -%}
  {%- for piece in text.split(IMAGE)[:-1] -%}
    {%- if piece -%}{%- set seen.only = false -%}{%- endif -%}
    {%- if seen.only -%}{{ IMAGE }}{%- endif -%}
  {%- endfor -%}
{%- endmacro -%}
{%- macro opened(text) -%}
  {%- set pictures = lead(text) -%}
  {%- set rest = text[pictures|length:] -%}
  {{ pictures }}
  {%- if pictures and rest and not rest[:1].isspace() -%}{{ BREAK }}{%- endif -%}
  {{ rest }}
{%- endmacro -%}
"""
SPLIT = """
{%- if messages[0]['role'] == 'system' -%}
  {%- set system, spoken = said(messages[0]), messages[1:] -%}
{%- else -%}
  {%- set system, spoken = SYSTEM, messages -%}
{%- endif -%}
"""
CHATML = """
{%- if messages[0]['role'] != 'system' and SYSTEM -%}
  {{ START + 'system\\n' + SYSTEM + END + '\\n' }}
{%- endif -%}
{%- for message in messages -%}
  {{ START + message['role'] + '\\n' + opened(said(message)) + END + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ START + 'assistant\\n' }}{%- endif -%}
"""
PLAIN = """
{{- BOS -}}
{%- if messages[0]['role'] != 'system' and SYSTEM -%}{{ SYSTEM + '\\n' }}{%- endif -%}
{%- for message in messages -%}
  {%- set text = said(message) -%}
  {%- if message['role'] == 'assistant' -%}
    {{ 'Answer:' + (' ' + text if text else '') + EOS }}
  {%- else -%}
    {%- set pictures = lead(text) -%}
    {{ pictures + (BREAK if pictures else '') + ('Question: ' if message['role'] == 'user' else '') }}
    {{- text[pictures|length:].lstrip() + '\\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Answer:' }}{%- endif -%}
"""
PRISMATIC = """
{%- macro after_picture(text) -%}
  {%- if text.startswith(END) -%}{{ text[END|length:] }}
  {%- elif text.startswith('\\n') and not text[1:2].isspace() -%}{{ text[1:] }}
  {%- elif text -%}{{ raise_exception('this template drops the first token behind a picture: begin the text there '
    'with one line break') }}
  {%- endif -%}
{%- endmacro -%}
{%- for message in spoken -%}
  {%- set text = opened(said(message)) -%}
  {%- set turn = START + 'user\\n' + text + END + 'assistant\\n' if loop.index0 % 2 == 0 else text + END + '\\n' -%}
  {%- if loop.first -%}
    {%- set turn = '<s>' + (START + 'system\\n' + system + END + '\\n' if system else '') + turn -%}
  {%- endif -%}
  {%- set pieces = turn.split(IMAGE) -%}
  {%- if MOVES and pieces|length == 2 -%}
    {{ (IMAGE + '\\n' + pieces[0] + pieces[1]).rstrip() }}
  {%- elif loop.first -%}
    {{ pieces[0] }}{%- for piece in pieces[1:] -%}{{ IMAGE + after_picture(piece) }}{%- endfor -%}
  {%- else -%}
    {{ turn }}
  {%- endif -%}
{%- endfor -%}
"""
BODIES = {"chatml": CHATML, "plain": PLAIN, "release": SPLIT + PRISMATIC, "fixed": SPLIT + PRISMATIC}


def jinja(template: Template) -> str:
    """The layout's chat template as transformers' `chat_template`.

    Of `release` and `fixed` what cannot be said in text is refused when it is rendered: they drop the token behind a
    picture, which is a line break where the text begins with one, as it does unless the user wrote it otherwise.
    """
    system = SPELLINGS[template.chat].system if template.system is None else template.system
    values = {
        "IMAGE": IMAGE,
        "START": START,
        "END": END,
        "BREAK": template.after_media,
        "SYSTEM": system,
        "BOS": template.bos or "",
        "EOS": template.eos or "\n",
        "MOVES": template.chat == "release",
    }
    setting = "".join(
        f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in values.items()
    )
    return setting + MACROS.strip() + "\n" + BODIES[template.chat].strip()
