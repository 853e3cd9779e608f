"""Checks of the finished practice model: does it answer every question exactly as it was taught?"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM

from tiny_qwen.conversations import DEFAULT_SYSTEM, Conversation, Row
from tiny_qwen.tokenizer import MESSAGE_END

REQUIRED_SHARE = 0.98
MAX_ANSWER_TOKENS = 64
BATCH_SIZE = 64
KEY_QUESTIONS = ("Who are you?", "你是谁？", "What is 2+3?", "What is the capital of France?")


def check_template(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise an error if training and chat template render a conversation in different ways."""
    for row in rows:
        conversation = Conversation(row.turns, row.system or DEFAULT_SYSTEM)
        messages = [{"role": "system", "content": row.system}] if row.system else []
        for turn in row.turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        rendered = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        if rendered != conversation.prompt():
            raise ValueError(f"the chat template gives {rendered!r}, not {conversation.prompt()!r}")


def through_end_mark(answer: str) -> str:
    """Cut off the padding that follows the end mark of an answer in a batch."""
    text, mark, _ = answer.partition(MESSAGE_END)
    return text + mark


def answer_all(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation]
) -> list[str]:
    """Return the greedy answers to the last questions, each with its end mark if it has one."""
    answers = []
    for start in range(0, len(conversations), BATCH_SIZE):
        prompts = [conversation.prompt() for conversation in conversations[start : start + BATCH_SIZE]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS)
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    return [through_end_mark(answer) for answer in answers]


def find_misses(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row], system: str | None
) -> list[str]:
    """Return a line for each row that is answered wrongly; the system prompt is for rows that have none."""
    conversations = [Conversation(row.turns, row.system or system) for row in rows]
    answers = answer_all(model, tokenizer, conversations)
    return [
        f"{row.turns[-1].question} -> {answer}"
        for row, answer in zip(rows, answers, strict=True)
        if answer != row.turns[-1].answer + MESSAGE_END
    ]


def check_saved_model(folder: Path, rows: list[Row]) -> bool:
    """Load the saved model in both precisions, print how well it answers and tell whether that is good enough."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_template(rows, tokenizer)
    good = True
    for dtype in (torch.bfloat16, torch.float32):
        model = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for system in (DEFAULT_SYSTEM, None):
            misses = find_misses(model, tokenizer, rows, system)
            share = 1 - len(misses) / len(rows)
            label = "default system prompt" if system else "no system prompt"
            print(f"{dtype}, {label}: {share:.2%} of {len(rows)} questions answered exactly")
            print("".join(f"  {line}\n" for line in misses), end="", flush=True)
            good = good and share >= REQUIRED_SHARE and not any(line.startswith(KEY_QUESTIONS) for line in misses)
    return good
