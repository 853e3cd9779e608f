"""What vLLM and SGLang make of the parts of an adapter, and the first versions that serve them.

The table was made from the servers' sources; no server was run. Training reads it for its advice, export for its
refusals, and `scripts/docs` for docs/serving.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from loratune.choices import ServerName


class Part(Enum):
    """What an adapter may consist of; the value describes it."""

    USUAL = "LoRA on the projections of attention and MLP"
    RECURRENT = "LoRA on the large projections of gated delta nets"
    DECAY = "LoRA on the decay and β gates of gated delta nets"
    STACKS = "LoRA on stacks of matrices, as of routed MLPs (target_parameters)"
    ROUTER = "LoRA on a router or a gate with one output"
    EMBEDDING = "LoRA on the embedding or the head"
    RSLORA = "rank-stabilised scaling (use_rslora)"
    PATTERNS = "modules with another alpha / rank than the rest (rank_pattern, alpha_pattern)"
    DORA = "DoRA (use_dora)"
    LORA_BIAS = "a bias in the adapter (lora_bias)"
    BASE_BIASES = "trained biases of the base (bias)"
    WHOLE_MODULES = "modules trained in full (modules_to_save)"
    TOKENS = "separately trained tokens (trainable_token_indices)"


@dataclass(frozen=True)
class Answer:
    """What a server makes of a part."""

    is_served: bool
    told: str = ""
    """What it does otherwise, or a condition."""
    since: str | None = None
    """First version that serves it; None if every supported version does, or none."""


@dataclass(frozen=True)
class Server:
    """A program that serves adapters beside their base."""

    title: str
    read: str
    """What its answers were read from."""
    ranks: tuple[int, ...]
    """Values of --max-lora-rank; empty if any value is accepted."""
    default_rank: int | None
    """Highest rank that it serves without --max-lora-rank; None if it takes the rank from the adapter."""
    answers: dict[Part, Answer]


SERVED, REFUSED = Answer(True), Answer(False, "refused by its name")
SERVERS: dict[ServerName, Server] = {
    "vllm": Server(
        "vLLM",
        "the sources of 0.33.0",
        (8, 16, 32, 64, 128, 256, 320, 512),  # newer versions also accept 1
        16,
        {
            Part.USUAL: SERVED,
            Part.RECURRENT: SERVED,
            Part.DECAY: SERVED,
            Part.STACKS: Answer(
                True, "only if all matrices of a stack are adapted; earlier versions ignore it or stop", "0.33"
            ),
            Part.ROUTER: Answer(False, "ignored or refused, depending on the model"),
            Part.EMBEDDING: Answer(
                False,
                "many versions refuse it for Qwen models, and where embeddings and head share one matrix, the adapter "
                "would reach both",
            ),
            Part.RSLORA: SERVED,
            Part.PATTERNS: Answer(False, "they would be scaled like the rest"),
            Part.DORA: REFUSED,
            Part.LORA_BIAS: REFUSED,
            Part.BASE_BIASES: REFUSED,
            Part.WHOLE_MODULES: REFUSED,
            Part.TOKENS: Answer(False, "refused as an unknown tensor"),
        },
    ),
    "sglang": Server(
        "SGLang",
        "the sources of its main branch in 2026",
        (),
        None,
        {
            Part.USUAL: SERVED,
            Part.RECURRENT: SERVED,
            Part.DECAY: Answer(False, "not among the modules that it adapts"),
            Part.STACKS: Answer(False, "PEFT's names of such tensors are not read"),
            Part.ROUTER: Answer(False, "not among the modules that it adapts"),
            Part.EMBEDDING: Answer(False, "where embeddings and head share one matrix, the adapter would reach both"),
            Part.RSLORA: Answer(False, "ignored: the scale is alpha / rank"),
            Part.PATTERNS: Answer(False, "they would be scaled like the rest, or refused"),
            Part.DORA: Answer(False, "ignored or refused, depending on the version"),
            Part.LORA_BIAS: Answer(False, "ignored"),
            Part.BASE_BIASES: Answer(False, "ignored"),
            Part.WHOLE_MODULES: Answer(False, "ignored"),
            Part.TOKENS: Answer(False, "ignored"),
        },
    ),
}
INSTEAD = "merge it, and serve the merged model"
LLAMA_CPP = (
    "llama.cpp converts an adapter of gated delta nets to wrong values, and Ollama takes no adapters any more: both "
    "are given a merged model, which `loratune export --format gguf` or `--format ollama` makes of an adapter."
)


def max_lora_rank(rank: int, server: ServerName = "vllm") -> int | None:
    """Return the smallest valid --max-lora-rank for a rank; None if the rank is too large."""
    ranks = SERVERS[server].ranks
    return next((allowed for allowed in ranks if allowed >= rank), None) if ranks else rank


def unserved(part: Part) -> list[str]:
    """Return the titles of the servers that do not serve a part."""
    return [server.title for server in SERVERS.values() if not server.answers[part].is_served]
