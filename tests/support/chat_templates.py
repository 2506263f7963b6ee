"""Chat templates for tests, written by us in the forms that ERNIE 4.5 was released with.

VL: User/Assistant with <|begin_of_sentence|>, no thinking unless asked for. VL_THINKING: the same turns, thinks unless
`options.thinking_mode` is "close", takes tools. TEXT_THINKING: <|im_start|> turns, always thinks, answers between
<response> marks, takes tools, and always ends with the opening of an answer, whatever add_generation_prompt says.
"""

from __future__ import annotations

_PARTS = (
    "{%- set count = namespace(images=0) -%}"
    "{%- macro render(content) -%}{%- if content is string -%}{{- content -}}{%- elif content is not none -%}"
    "{%- for part in content -%}{%- if part.type in ['image', 'image_url'] -%}"
    "{%- set count.images = count.images + 1 -%}"
    "{{- 'Picture ' ~ count.images ~ ':<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)

VL = (
    "{%- if not add_generation_prompt is defined -%}{%- set add_generation_prompt = true -%}{%- endif -%}"
    + _PARTS
    + "{{- '<|begin_of_sentence|>' -}}{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{- render(message.content) + '\n' -}}"
    "{%- elif message.role == 'user' -%}{{- 'User: ' + render(message.content) -}}"
    "{%- elif message.role == 'assistant' -%}"
    "{%- set content = render(message.content) -%}{%- set reasoning = '' -%}"
    "{%- if message.reasoning_content is defined and message.reasoning_content -%}"
    "{%- set reasoning = message.reasoning_content -%}"
    "{%- elif '</think>' in content -%}"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1] -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '\nAssistant: ' -}}"
    "{%- if reasoning.strip() -%}{{- '<think>\n' + reasoning.strip() + '\n</think>\n' -}}{%- endif -%}"
    "{{- content + '<|end_of_sentence|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\nAssistant: ' -}}"
    "{{- '<think>' if enable_thinking is defined and enable_thinking else '<think>\n\n</think>\n\n' -}}{%- endif -%}"
)

VL_THINKING = (
    _PARTS + "{%- set mode = options.thinking_mode if options is defined and options.thinking_mode is defined"
    " else 'open' -%}"
    "{{- '<|begin_of_sentence|>' -}}"
    "{%- if messages[0].role == 'system' -%}{{- render(messages[0].content) + '\n' -}}{%- endif -%}"
    "{%- if tools -%}{{- '\n<tool_list>\n' + tools | tojson + '\n</tool_list>\n' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{- 'User: ' + render(message.content) -}}"
    "{%- elif message.role == 'tool' -%}"
    "{{- 'User: <tool_output>\n' + render(message.content) + '\n</tool_output>\n' -}}"
    "{%- elif message.role == 'assistant' -%}{{- '\nAssistant: ' -}}"
    "{%- if message.reasoning_content is defined and message.reasoning_content -%}"
    "{{- '\n<think>\n' + message.reasoning_content.strip() + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- render(message.content) -}}"
    "{%- if message.tool_calls -%}{%- for call in message.tool_calls -%}"
    "{{- '\n<tool_call>\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson"
    " + '\n</tool_call>' -}}{%- endfor -%}{%- endif -%}"
    "{{- '<|end_of_sentence|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt is not defined or add_generation_prompt -%}{{- '\nAssistant: ' -}}"
    "{{- '\n<think>\n' if mode == 'open' else '\n<think>\n\n</think>\n\n' -}}{%- endif -%}"
)

TEXT_THINKING = (
    "{{- '<|im_start|>system\n' -}}"
    "{%- if messages[0].role == 'system' -%}"
    "{{- '<system_setting>\n' + messages[0].content + '\n</system_setting>\n\n' -}}{%- endif -%}"
    "{{- '<global_setting>\nthink_mode=True\n</global_setting>' -}}"
    "{%- if tools -%}{{- '\n\n<tool_list>\n' + tools | tojson + '\n</tool_list>' -}}{%- endif -%}"
    "{{- '<|im_end|>\n\n' -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n\n' -}}"
    "{%- elif message.role == 'tool' -%}"
    "{{- '<|im_start|>tool\n<tool_output>\n' + message.content + '\n</tool_output><|im_end|>\n\n' -}}"
    "{%- elif message.role == 'assistant' -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if message.reasoning_content is defined and message.reasoning_content -%}"
    "{{- '<think>\n' + message.reasoning_content.strip() + '\n</think>\n\n\n' -}}{%- endif -%}"
    "{%- if message.content -%}{{- '<response>\n' + message.content + '\n</response>\n' -}}{%- endif -%}"
    "{%- if message.tool_calls -%}{%- for call in message.tool_calls -%}"
    "{{- '<tool_call>\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson"
    " + '\n</tool_call>\n' -}}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n\n' -}}{%- endif -%}{%- endfor -%}\n"
    "{{- '<|im_start|>assistant\n<think>\n' -}}"
)
