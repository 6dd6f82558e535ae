"""RETRO learns to read: what can only be copied from a neighbor is predicted, and nothing else is (experiment E1).

Every token is drawn uniformly from 64, so without reading there are 6 bits to pay for each. The next chunk stands as the
continuation of one of the two neighbors of a chunk; which one can only be told by comparing the chunk with both, since
the right neighbor begins with a copy of it in which a fifth of the tokens are wrong. Data are fresh at every step. In
half of the chunks both neighbors are random, so the model also has to learn when not to trust them.

The first token of a chunk is the hard one: whoever trusts the last token of the copy alone pays 1.1 bits for it, and
nothing for the others, which have the exact continuation to go by. Telling the neighbors apart by the whole chunk is the
encoder's work, so both of its layers compare, its states have little room to carry two tokens at once, and so do the heads
that read them.
"""

import math

import pytest
import torch

from retro_hf import RetroConfig, RetroDecoderConfig, RetroEncoderConfig, RetroForCausalLM


VOCAB_SIZE = 64
CHUNK_SIZE = 8
NUM_NEIGHBORS = 2
NUM_CHUNKS = 4
STEPS = 1000
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
NOISE = 0.2


def toy_retro() -> RetroForCausalLM:
    """0.2 million parameters; embeddings of unit variance, as in `nn.Embedding`, so that tokens are told apart early."""
    init = {"initializer_range": 64**-0.5}
    model = RetroForCausalLM(
        RetroConfig(
            text_config=RetroDecoderConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                head_dim=16,
                max_position_embeddings=NUM_CHUNKS * CHUNK_SIZE,
                tie_word_embeddings=False,
                **init,
            ),
            neighbor_encoder_config=RetroEncoderConfig(
                hidden_size=32,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                head_dim=16,
                cross_attention_layers=[0, 1],
                **init,
            ),
            chunk_size=CHUNK_SIZE,
            num_neighbors=NUM_NEIGHBORS,
            neighbor_size=2 * CHUNK_SIZE,
            cross_attention_layers=[0, 1],
            cross_attention_head_dim=8,
            share_embeddings=True,
            **init,
        )
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
    return model


def draw(batch_size: int, generator: torch.Generator, real: float) -> dict[str, torch.Tensor]:
    """Sequences, the neighbors of all chunks but the last, and labels from the second chunk on.

    Args:
        real: share of chunks of which one neighbor is the right one.
    """
    chunks = torch.randint(VOCAB_SIZE, (batch_size, NUM_CHUNKS, CHUNK_SIZE), generator=generator)
    shape = (batch_size, NUM_CHUNKS - 1)
    neighbors = torch.randint(VOCAB_SIZE, (*shape, NUM_NEIGHBORS, 2 * CHUNK_SIZE), generator=generator)
    wrong = torch.rand(*shape, CHUNK_SIZE, generator=generator) < NOISE
    copies = torch.where(wrong, torch.randint(VOCAB_SIZE, wrong.shape, generator=generator), chunks[:, :-1])
    right = torch.cat([copies, chunks[:, 1:]], dim=-1)
    place = torch.randint(NUM_NEIGHBORS, shape, generator=generator)
    chosen = torch.arange(NUM_NEIGHBORS) == place.unsqueeze(-1)
    chosen &= (torch.rand(shape, generator=generator) < real).unsqueeze(-1)
    input_ids = chunks.flatten(1)
    labels = input_ids.clone()
    labels[:, :CHUNK_SIZE] = -100
    return {
        "input_ids": input_ids,
        "neighbor_input_ids": torch.where(chosen.unsqueeze(-1), right.unsqueeze(-2), neighbors),
        "labels": labels,
    }


def train(seed: int, steps: int = STEPS) -> RetroForCausalLM:
    """AdamW with a short warm-up and a linear end; half of the chunks with random neighbors."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = toy_retro().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1.0, max((steps - step) / (0.3 * steps), 0.02))
    )
    for _ in range(steps):
        loss = model(**draw(BATCH_SIZE, generator, real=0.5)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def measure(model: RetroForCausalLM, real: float, neighbors: bool = True) -> torch.Tensor:
    """Bits of each token of fresh data from the second chunk on, `(rows, chunks, offsets)`."""
    batch = draw(512, torch.Generator().manual_seed(10**6), real)
    labels = batch.pop("labels")[:, 1:]
    if not neighbors:
        del batch["neighbor_input_ids"]
    logits = model(**batch).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return nats[:, CHUNK_SIZE - 1 :].unflatten(1, (NUM_CHUNKS - 1, CHUNK_SIZE)) / math.log(2)


def test_an_untrained_model_pays_six_bits():
    """The start: uniform tokens, nothing learned."""
    torch.manual_seed(0)
    assert float(measure(toy_retro().eval(), 1.0).mean()) > 5.95


@pytest.mark.slow  # 1,000 steps of training
def test_a_model_learns_to_read_its_neighbors_and_only_them():
    """At most half a bit of six is left with real neighbors; none and random ones leave six; no place is read worse.

    One test, so that parallel test runs train once.
    """
    model = train(seed=0)
    bits = measure(model, 1.0)
    assert float(bits.mean()) <= 0.5

    # Less than 6 bits would be a leak, much more would be trust in bad neighbors.
    without = float(measure(model, 1.0, neighbors=False).mean())
    with_random = float(measure(model, 0.0).mean())
    assert 5.9 <= without <= 6.3 and 5.9 <= with_random <= 6.3

    # A shift of the attending chunk by one would cost 6 bits at the first token, or the exact copy of the last.
    for by in (bits.mean(dim=(0, 1)), bits.mean(dim=(0, 2))):
        assert float(by.max() - by.min()) <= 0.3, by
