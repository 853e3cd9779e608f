"""The practice model: its size, its training and how it is saved."""

import time
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, logging

from tiny_qwen.conversations import Conversation, ConversationSource
from tiny_qwen.tokenizer import END_OF_TEXT, MESSAGE_END

BATCH_SIZE = 48
POOLED_BATCHES = 8
PEAK_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
IGNORED = -100


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Create a Qwen2 model of about four million parameters with random weights."""
    end_of_text, message_end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, MESSAGE_END])
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=message_end,
        pad_token_id=end_of_text,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[message_end, end_of_text], pad_token_id=end_of_text
    )
    return model


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token numbers of a conversation and the labels, which ignore all but the answers."""
    ids: list[int] = []
    labels: list[int] = []
    for text, trained in conversation.segments():
        piece = tokenizer(text)["input_ids"]
        ids += piece
        labels += piece if trained else [IGNORED] * len(piece)
    return ids, labels


class BatchSource:
    """An endless supply of batches of conversations of similar length."""

    def __init__(self, conversations: ConversationSource, tokenizer: PreTrainedTokenizerBase) -> None:
        self.conversations = conversations
        self.tokenizer = tokenizer
        self.pool: list[list[tuple[list[int], list[int]]]] = []

    def next_batch(self) -> dict[str, torch.Tensor]:
        """Return the next batch as tensors padded on the right."""
        if not self.pool:
            self.fill_pool()
        batch = self.pool.pop()
        width = max(len(ids) for ids, _ in batch)
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in batch]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch]),
            "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in batch]),
        }

    def fill_pool(self) -> None:
        """Draw conversations for several batches and sort them by length, which saves most of the padding."""
        drawn = [
            encode(self.conversations.next_conversation(), self.tokenizer) for _ in range(BATCH_SIZE * POOLED_BATCHES)
        ]
        drawn.sort(key=lambda pair: len(pair[0]))
        self.pool = [drawn[start : start + BATCH_SIZE] for start in range(0, len(drawn), BATCH_SIZE)]
        self.conversations.rng.shuffle(self.pool)


def train(model: Qwen2ForCausalLM, batches: BatchSource, steps: int) -> None:
    """Train the model with AdamW, a short warm-up and a cosine schedule, and print the progress."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
    )
    warmup = min(50, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.02, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup)),
        ],
        milestones=[warmup],
    )
    model.train()
    started = time.monotonic()
    for step in range(1, steps + 1):
        loss = model(**batches.next_batch(), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)


def save_model(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Save the weights in bfloat16, next to the tokenizer, as files that everyone may read."""
    logging.disable_progress_bar()
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in folder.iterdir():
        # safetensors makes its files private to their owner.
        path.chmod(0o644)
