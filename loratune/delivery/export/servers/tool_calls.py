"""Maps the form of a template's tool calls to vLLM's parsers."""

from __future__ import annotations

from loratune.data.tools.call_form import CallForm
from loratune.data.tools.call_shapes import ObjectShape, ParameterShape


def vllm_tool_parser(form: CallForm | None) -> str | None:
    """Return vLLM's parser for the calls of a template; None if there is none, or it is unknown."""
    if form is None:
        return None
    opening, closing, shape = form.in_words(form.opening), form.in_words(form.closing), form.shape
    if isinstance(shape, ParameterShape):
        is_coder = opening == "<tool_call><function=" and form.in_words(shape.first) == "><parameter="
        return "qwen3_coder" if is_coder else None
    if not isinstance(shape, ObjectShape) or shape.are_text or shape.name != ("name",):
        return None
    if form.is_bare:
        return "llama3_json" if shape.arguments in (("arguments",), ("parameters",)) else None
    known = {("<tool_call>", "</tool_call>"): "hermes", ("[TOOL_CALLS][", "]"): "mistral"}
    return known.get((opening, closing)) if shape.arguments == ("arguments",) else None
