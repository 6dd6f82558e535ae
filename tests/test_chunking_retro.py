"""The chunk arithmetic: which chunks complete, which token attends to which chunk, and the example that explains it."""

import pytest
import torch

from retro_hf.model.cache_retro import RetrievalState, chunk_offsets
from retro_hf.model.planning_retro import plan_pass
from retro_hf.model.retriever_protocol_retro import RetroLookup

from .tiny import VOCAB_SIZE, hash_retriever, random_ids, random_neighbors


SIZE = 4


def given(batch_size: int, num_chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    neighbors = random_neighbors(batch_size, num_chunks)
    return neighbors["neighbor_input_ids"], neighbors["neighbor_attention_mask"].bool()


def test_the_example_of_the_module_is_true():
    """Two rows of seven columns, chunks of four tokens, the second row left-padded by two."""
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]).bool()
    plan = plan_pass(random_ids(2, 7), real, SIZE, given=given(2, 1))
    assert plan.positions_in_pass.tolist() == [[0, 1, 2, 3, 4, 5, 6], [-1, -1, 0, 1, 2, 3, 4]]
    assert plan.completed_tokens.tolist() == [[0, 1, 2, 3], [9, 10, 11, 12]]
    assert plan.attending_tokens.tolist() == [[3, 4, 5, 6], [12, 13, 14, 14]]
    columns = torch.arange(1.0, 15).view(2, 7, 1)
    assert plan.attending(columns).squeeze(-1).tolist() == [[4, 5, 6, 7], [13, 14, 0, 0]]
    chunk_of_cell = torch.arange(2.0).view(2, 1, 1).expand(2, SIZE, 1) + 1
    assert plan.per_token(chunk_of_cell).squeeze(-1).tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 2, 2]]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 3, 4, 7, 11, 12])
def test_a_token_attends_to_the_chunk_that_ended_last(padding, offset, length):
    """Position p attends to chunk (p + 1) // m - 1, whatever the padding."""
    num_chunks = (length + offset) // SIZE + 1
    real = torch.zeros(1, length + 2, dtype=torch.bool)
    real[:, slice(2, None) if padding == "left" else slice(length)] = True
    plan = plan_pass(random_ids(1, length + 2), real, SIZE, given=given(1, num_chunks), chunk_offset=offset)
    chunks = torch.arange(1.0, len(plan.neighbor_input_ids) + 1).view(-1, 1, 1).expand(-1, SIZE, 1)
    expected = [max((offset + token + 1) // SIZE, 0) for token in range(length)]
    assert plan.per_token(chunks)[real].flatten().tolist() == expected


@pytest.mark.parametrize("pieces", [[14], [1] * 14, [3, 1, 7, 3], [5, 4, 1, 4]])
def test_every_chunk_is_looked_up_once_however_the_tokens_come(pieces):
    """Rows with other offsets complete their chunks in other passes."""
    ids, offsets, retriever = random_ids(2, 14), torch.tensor([0, 3]), hash_retriever()
    state = RetrievalState(chunk_offsets(offsets, 2, SIZE), SIZE)
    for piece in ids.split(pieces, dim=1):
        lookup = RetroLookup(retriever, VOCAB_SIZE)
        plan = plan_pass(piece, None, SIZE, state=state, retriever=lookup, chunk_offset=offsets)
        plan.take_completed(torch.randn(2, piece.shape[1], 8))
        plan.commit()
    looked_up = torch.cat(retriever.calls).tolist()
    rows = [ids[0].tolist(), [0, 0, 0, *ids[1].tolist()]]
    expected = [row[u * SIZE : (u + 1) * SIZE] for row in rows for u in range(len(row) // SIZE)]
    assert sorted(looked_up) == sorted(expected)
    assert state.next_positions == [14, 17]
