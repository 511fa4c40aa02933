"""lm-eval measures the text side: does the LLM behind the interfaces keep what it could do before?

The LLM is frozen, so its text scores through an X2L model are those of the LLM itself, and this shows it with a tool
that others wrote. Written for lm-eval 0.4.13, which is imported here alone and is no dependency of x2l:

    lm_eval.simple_evaluate(language_model(Assistant.load("tiny")), tasks=["hellaswag"])
"""

from __future__ import annotations

from lm_eval.models.huggingface import HFLM

from x2l.assistant import Assistant


def language_model(assistant: Assistant, batch_size: int = 1) -> HFLM:
    """The LLM of a loaded model with its tokenizer, as lm-eval takes it."""
    return HFLM(pretrained=assistant.model.llm, tokenizer=assistant.tokenizer, batch_size=batch_size)
