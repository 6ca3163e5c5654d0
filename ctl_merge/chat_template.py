"""Chat templates: known by name, and where tokenizers keep them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ctl_merge.tokenizer import TokenizerFiles, written

# Each in the words of the format's own documentation.
TEMPLATES: Mapping[str, str] = {
    "alpaca": """\
{%- if messages[0]['role'] == 'system' -%}
{%- set preamble = messages[0]['content'] | trim, messages[1:] -%}
{%- else -%}
{%- set preamble = 'Below is an instruction that describes a task. Write a response that appropriately completes \
the request.', messages -%}
{%- endif -%}
{{- preamble[0] -}}
{%- for message in preamble[1] -%}
{%- if message['role'] == 'user' -%}
{{- '\\n\\n### Instruction:\\n' + message['content'] | trim -}}
{%- elif message['role'] == 'assistant' -%}
{{- '\\n\\n### Response:\\n' + message['content'] | trim + eos_token -}}
{%- else -%}
{{- raise_exception('Alpaca knows a system message at the beginning, then user and assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '\\n\\n### Response:\\n' -}}
{%- endif -%}
""",
    "chatml": """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""",
    "exaone": """\
{%- if messages[0]['role'] != 'system' -%}
{{- '[|system|][|endofturn|]\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '[|' + message['role'] + '|]' + message['content'] -}}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '[|assistant|]' -}}
{%- endif -%}
""",
    "llama3": """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
""",
    "mistral": """\
{{- bos_token -}}
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] not in ('user', 'assistant') -%}
{{- raise_exception('after an optional system message, user and assistant take turns') -}}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' -}}
{%- else -%}
{{- ' ' + message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
""",
}

JINJA, CONFIG, PROCESSOR = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"


def is_literal(text: str) -> bool:
    """Whether a recipe's `chat_template` is a template itself, and not the name of one."""
    return "{" in text


def template_of(files: TokenizerFiles) -> str | None:
    """The default chat template in a model's files, as transformers finds it."""
    if JINJA in files:
        return files.text(JINJA)
    for path in (CONFIG, PROCESSOR):
        stated = files.json(path).get("chat_template")
        if isinstance(stated, list):  # several, by name
            stated = {entry["name"]: entry["template"] for entry in stated}.get("default")
        if isinstance(stated, str):
            return stated
    return None


def most_common(templates: Iterable[str | None]) -> str | None:
    """The template that most models have, and of equally many the first model's; white space around it is no matter."""
    given = [template for template in templates if template and template.strip()]
    counts = Counter(template.strip() for template in given)
    return max(given, key=lambda template: counts[template.strip()], default=None)


def placed(files: TokenizerFiles, template: str) -> dict[str, bytes | None]:
    """The changed files of a tokenizer with the template in place of all that it had; None: to be left out.

    It goes where the tokenizer keeps its template, into tokenizer_config.json where it has none: all readers know that.
    """
    named = [path for path in files.files if path.startswith("additional_chat_templates/")]
    changed: dict[str, bytes | None] = dict.fromkeys(named)
    config = files.json(CONFIG)
    if JINJA in files:
        changed[JINJA] = template.encode()
        config.pop("chat_template", None)
    else:
        config["chat_template"] = template
    if config != files.json(CONFIG):
        changed[CONFIG] = written(config)
    if PROCESSOR in files:
        changed[PROCESSOR] = written({**files.json(PROCESSOR), "chat_template": template})
    return changed
