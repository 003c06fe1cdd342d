"""Chat templates of the shapes that models have, written for the tests, on the embedded tokenizer."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from qlab.engine.io.gguf_tokenizer import tokenizer
from qlab.runtime.job import mlx_call

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# says who it is unless told, trims, and ends turns with a mark that has no line break
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = 'You are helpful.' %}{% set rest = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{% if tools %}{{ 'Functions: ' + (tools | tojson) + '\n' }}{% endif %}{{ system + '<|eot_id|>' }}"
    "{% for m in rest %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    '{% if m.tool_calls %}{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<|eom_id|>' }}"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# after the last question it shows every thought, an empty one too; from earlier turns it strips them
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% set answer = parts[-1].lstrip('\n') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + answer }}{% else %}{{ answer }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# opens the thought in the prompt, and never shows it again
OPENED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1].lstrip('\n') + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# no opening of the assistant's turn, and the end token as the only mark
INST = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant.') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
# another mark for the last turn than for the ones before
RETURN = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# a reply changes how everything before it is shown
SHIFTING = "{% for m in messages %}{{ m.content + (messages | length | string) + (messages[-1].content | length | string) }}{% endfor %}"
# says first how many turns there are, so that nothing is the beginning of anything
COUNTED = "{{ messages | length }}|" + CHATML
COUNTED_OPENED = "{{ messages | length }}|" + OPENED
# the same, without any mark
PLAIN = (
    "{{ messages | length }}|{% for m in messages %}{{ ('User: ' if m.role == 'user' else 'Bot: ') + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Bot: ' }}{% endif %}"
)
# ends a turn only when the next one comes
LATE = (
    "{% for m in messages %}{{ eos_token if m.role == 'user' and not loop.first else '' }}"
    "{{ ('User: ' if m.role == 'user' else 'Bot: ') + m.content }}{% endfor %}{% if add_generation_prompt %}{{ 'Bot: ' }}{% endif %}"
)
# a thought in the last turn changes the beginning
MODE = "{{ 'deep ' if '</think>' in messages[-1].content else '' }}" + CHATML
# a turn says how long the one before was, and the last one has another mark
MEASURED = (
    "{% for m in messages %}{{ '<|start|>' + m.role + ((loop.previtem.content | length | string) if loop.previtem else '') + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
_MARKS = {
    CHATML: ("<|im_end|>", "<|im_start|>"),
    THINKING: ("<|im_end|>", "<|im_start|>"),
    GENERATION: ("<|im_end|>", "<|im_start|>"),
    LLAMA3: ("<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    OPENED: ("<|end|>", "<|user|>", "<|assistant|>"),
    INST: ("</s>",),
    SHIFTING: ("</s>",),
    COUNTED: ("<|im_end|>", "<|im_start|>"),
    COUNTED_OPENED: ("<|end|>", "<|user|>", "<|assistant|>"),
    PLAIN: ("</s>",),
    LATE: ("</s>",),
    MODE: ("<|im_end|>", "<|im_start|>"),
    MEASURED: ("<|return|>", "<|end|>", "<|start|>"),
    RETURN: ("<|return|>", "<|end|>", "<|start|>", "<|message|>"),
}


def speaking(plain: Any, template: str) -> TokenizerWrapper:
    """Return a tokenizer with a chat template, and the marks of it as tokens."""
    inner = copy.deepcopy(plain._tokenizer)
    marks = _MARKS[template]
    inner.add_special_tokens(
        {"eos_token": marks[0], "bos_token": "<s>", "additional_special_tokens": list(marks[1:])}
    )
    inner.add_tokens(["<think>", "</think>"])
    inner.chat_template = template
    return TokenizerWrapper(inner)


@functools.cache
def of_gguf(path: Path) -> TokenizerWrapper:
    """Return the tokenizer in a GGUF file, its chat template included, without the model."""
    return tokenizer(path, mlx_call(mx.load, str(path), return_metadata=True)[1])
