"""The contract checks are sharp: each mistake that one could make in the model turns one of them red.

Every test first runs its check on the model as it is, then makes one mistake, and runs it again.
"""

import copy

import pytest
import torch

from retro_hf.model import chunking_retro, modeling_retro, modeling_retro_decoder

from . import contracts
from .contracts import oracle_model
from .tiny import random_ids, random_neighbors, tiny_retro


def assert_red(check, model, mutate, monkeypatch) -> None:
    """The check holds, and no longer holds after the mistake."""
    check(model)
    mutate(model, monkeypatch)
    with pytest.raises(AssertionError):
        check(model)


# ── the mistakes ──────────────────────────────────────────────────────────────────────────────────────────────────────


def shift_attending_chunks(by: int):
    """Attending chunks that begin `by` tokens early."""

    def mutate(model, monkeypatch):
        original = chunking_retro.SequencePlan.__init__

        def init(self, positions, *args, **kwargs):
            original(self, positions, *args, **kwargs)
            size = model.config.chunk_size
            num_cells = self.attending_tokens.numel() // len(positions)
            cells = positions + 1 + by - (0 if self.state is not None else size)
            inside = (positions >= 0) & (cells >= 0) & (cells < num_cells)
            cells = torch.where(inside, cells, num_cells)
            self.token_cells = chunking_retro._flat(cells, num_cells)
            columns = chunking_retro._invert(cells, num_cells)
            self.attending_tokens = chunking_retro._flat(columns, positions.shape[1]).view(-1, size)

        monkeypatch.setattr(chunking_retro.SequencePlan, "__init__", init)

    return mutate


def attend_to_the_next_chunk(model, monkeypatch):
    """CCA over the neighbors of the chunk that is being completed, rather than of the complete one."""
    shift_attending_chunks(model.config.chunk_size)(model, monkeypatch)


def change_encoder_layer(**change):
    """Encoder layers that get other masks or sinusoids; each value maps an argument to what is passed instead."""

    def mutate(model, monkeypatch):
        names = ("hidden_states", "chunk_states", "neighbor_mask", "chunk_mask", "self_sinusoids", "cross_sinusoids")
        for layer in model.model.retro.encoder.layers:
            original = layer.forward

            def forward(*args, original=original):
                inputs = dict(zip(names, args, strict=True))
                return original(**{name: change.get(name, lambda x: x)(value) for name, value in inputs.items()})

            monkeypatch.setattr(layer, "forward", forward)

    return mutate


ignore_the_neighbor_mask_in_the_encoder = change_encoder_layer(neighbor_mask=torch.ones_like)
ignore_the_chunk_mask = change_encoder_layer(chunk_mask=torch.ones_like)
attend_causally_in_the_encoder = change_encoder_layer(
    neighbor_mask=lambda mask: mask & torch.ones(mask.shape[-1], mask.shape[-1], dtype=torch.bool).tril()
)
mix_neighbors_in_the_encoder = change_encoder_layer(hidden_states=lambda x: x + x.roll(1, dims=0))
forget_distances_in_the_encoder = change_encoder_layer(self_sinusoids=lambda x: x[:1].expand_as(x))
cut_the_gradient_of_chunk_states = change_encoder_layer(chunk_states=torch.Tensor.detach)


def mirrored(sinusoids: torch.Tensor) -> torch.Tensor:
    """The sinusoids of the opposite distances: sines change sign, cosines do not."""
    sines, cosines = sinusoids.chunk(2, dim=-1)
    return torch.cat([-sines, cosines], dim=-1)


mirror_distances_in_the_encoder = change_encoder_layer(self_sinusoids=mirrored)
mirror_distances_to_the_chunk = change_encoder_layer(cross_sinusoids=mirrored)


def change_cca(change):
    """CCA whose `forward` is `change(module, original, hidden_states, neighbor_states, sinusoids, plan)`."""

    def mutate(model, monkeypatch):
        for module in model.model.retro.cross_attention.values():
            monkeypatch.setattr(
                module,
                "forward",
                lambda *args, module=module, original=module.forward: change(module, original, *args),
            )

    return mutate


def cca_distances(function):
    """CCA with sinusoids of `function(distances, chunk_size)` in the place of equation 6."""

    def change(module, original, hidden_states, neighbor_states, sinusoids, plan):
        size = sinusoids.shape[0] - plan.neighbor_size + 1
        distances = function(2 * size - 2 - torch.arange(len(sinusoids)), size)
        sinusoids = modeling_retro.sinusoids_of(distances, sinusoids.shape[-1], sinusoids.dtype)
        return original(hidden_states, neighbor_states, sinusoids, plan)

    return change_cca(change)


absolute_distances_in_cca = cca_distances(lambda distances, size: distances.abs())
mirrored_distances_in_cca = cca_distances(lambda distances, size: -distances)
distances_in_cca_one_too_long = cca_distances(lambda distances, size: distances + 1)
distances_in_cca_without_m = cca_distances(lambda distances, size: distances - (size - 1))
no_distances_in_cca = cca_distances(lambda distances, size: 0 * distances)


def place_neighbors_one_after_the_other(model, monkeypatch):
    """Distances in CCA over the concatenated neighbors, as if they were one text."""

    def change(module, original, hidden_states, neighbor_states, sinusoids, plan):
        size = sinusoids.shape[0] - plan.neighbor_size + 1
        num_tokens = neighbor_states.shape[1]
        distances = 2 * size - 2 - torch.arange(size + num_tokens - 1)
        sinusoids = modeling_retro.sinusoids_of(distances, sinusoids.shape[-1], sinusoids.dtype)
        plan = copy.copy(plan)
        plan.neighbor_input_ids = plan.neighbor_input_ids.flatten(1)  # one long neighbor
        return original(hidden_states, neighbor_states, sinusoids, plan)

    change_cca(change)(model, monkeypatch)


def _attend_unguarded(module, norm, hidden_states, neighbor_states, sinusoids, plan):
    queries = norm(plan.attending(hidden_states))
    key, value = plan.exchange_key_values(module.layer_idx, *module.attention.project_key_value(neighbor_states))
    mask = plan.attended_mask
    repeats = mask.shape[1] // plan.neighbor_size
    update, _ = module.attention.attend(queries, key, value, sinusoids, mask[:, None, None], num_repeats=repeats)
    return mask, update


def ignore_the_neighbor_mask_in_cca(model, monkeypatch):
    """CCA over padding, too."""

    def change(module, original, hidden_states, neighbor_states, sinusoids, plan):
        plan = copy.copy(plan)
        plan.attended_mask = torch.ones_like(plan.attended_mask)
        return original(hidden_states, neighbor_states, sinusoids, plan)

    change_cca(change)(model, monkeypatch)


def ignore_the_neighbor_mask(model, monkeypatch):
    """All neighbor tokens are taken for real ones, everywhere."""
    ignore_the_neighbor_mask_in_the_encoder(model, monkeypatch)
    ignore_the_neighbor_mask_in_cca(model, monkeypatch)


def update_chunks_without_neighbors(model, monkeypatch):
    """CCA that lets the softmax over nothing but padding through."""

    def change(module, original, hidden_states, neighbor_states, sinusoids, plan):
        _, update = _attend_unguarded(module, module.norm, hidden_states, neighbor_states, sinusoids, plan)
        return plan.per_token(update), None

    change_cca(change)(model, monkeypatch)


def norm_after_cca(model, monkeypatch):
    """The norm of CCA on its output rather than on its queries."""

    def change(module, original, hidden_states, neighbor_states, sinusoids, plan):
        mask, update = _attend_unguarded(module, lambda x: x, hidden_states, neighbor_states, sinusoids, plan)
        return plan.per_token(torch.where(mask.any(dim=-1)[:, None, None], module.norm(update), 0.0)), None

    change_cca(change)(model, monkeypatch)


def change_call(call):
    """Another order of operators: `call(self, layer_idx, hidden_states, is_first)` in the place of `RetroPass.__call__`."""

    def mutate(model, monkeypatch):
        def wrapped(self, layer_idx, hidden_states):
            self.layers_read.append(layer_idx)
            return call(self, layer_idx, hidden_states, layer_idx == self.config.cross_attention_layers[0])

        monkeypatch.setattr(modeling_retro.RetroPass, "__call__", wrapped)

    return mutate


@change_call
def take_chunk_states_before_attention(self, layer_idx, hidden_states, is_first):
    """H_u is the input of layer min(P)."""
    if is_first:
        self.neighbor_states = self.encode(self.layer_inputs[layer_idx])
    return self.attend(layer_idx, hidden_states, self.neighbor_states)


@change_call
def take_chunk_states_from_the_branch(self, layer_idx, hidden_states, is_first):
    """H_u is the output of self-attention, without the residual."""
    if is_first:
        self.neighbor_states = self.encode(hidden_states - self.layer_inputs[layer_idx])
    return self.attend(layer_idx, hidden_states, self.neighbor_states)


@change_call
def take_chunk_states_after_cca(self, layer_idx, hidden_states, is_first):
    """H_u for the later layers is the residual stream after CCA of layer min(P)."""
    if is_first:
        update = self.attend(layer_idx, hidden_states, self.encode(hidden_states))
        self.neighbor_states = self.encode(hidden_states + update)
        return update
    return self.attend(layer_idx, hidden_states, self.neighbor_states)


@change_call
def encode_anew_in_every_layer(self, layer_idx, hidden_states, is_first):
    """E_u is conditioned on the residual stream of each layer of P, rather than on that of min(P)."""
    return self.attend(layer_idx, hidden_states, self.encode(hidden_states))


@change_call
def cross_attend_beside_attention(self, layer_idx, hidden_states, is_first):
    """CCA reads what self-attention reads, rather than what it has made of it."""
    if is_first:
        self.neighbor_states = self.encode(hidden_states)
    return self.attend(layer_idx, self.layer_inputs[layer_idx], self.neighbor_states)


@change_call
def add_cca_twice(self, layer_idx, hidden_states, is_first):
    """The update is added two times."""
    if is_first:
        self.neighbor_states = self.encode(hidden_states)
    return 2 * self.attend(layer_idx, hidden_states, self.neighbor_states)


@change_call
def share_rows(self, layer_idx, hidden_states, is_first):
    """Each row gets a little of the update of the row before it in the batch."""
    if is_first:
        self.neighbor_states = self.encode(hidden_states)
    update = self.attend(layer_idx, hidden_states, self.neighbor_states)
    return update + 0.1 * update.roll(1, dims=0)


def see_the_future(model, monkeypatch):
    """Self-attention of the decoder without its causal mask."""

    def mask(config, inputs_embeds, **kwargs):
        num_tokens = inputs_embeds.shape[1]
        return torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool)

    monkeypatch.setattr(modeling_retro_decoder, "create_causal_mask", mask)


def count_columns_instead_of_tokens(model, monkeypatch):
    """A chunk grid that counts padding."""
    monkeypatch.setattr(modeling_retro, "real_tokens", lambda *args: None)


def without_norm(name: str):
    """The model without one of its norms."""

    def mutate(model, monkeypatch):
        monkeypatch.setattr(model.get_submodule(name), "forward", lambda x: x)

    return mutate


# ── the mistakes turn checks red ──────────────────────────────────────────────────────────────────────────────────────


FLOW, ORACLE = contracts.check_information_flow, contracts.check_agrees_with_oracle
GRADIENTS, APART = contracts.check_gradients_agree_with_oracle, contracts.check_neighbors_are_encoded_apart
ORDER, DUPLICATES = contracts.check_neighbor_order_is_irrelevant, contracts.check_duplicates_change_nothing
MASKED, EMPTY = (
    contracts.check_masked_neighbors_have_no_influence,
    contracts.check_chunks_without_neighbors_get_no_update,
)
PADDING = contracts.check_padding_is_invisible

MUTATIONS = {
    "attending chunk one token early": (shift_attending_chunks(1), [FLOW, ORACLE]),
    "attending chunk one token late": (shift_attending_chunks(-1), [FLOW, ORACLE]),
    "neighbors of the chunk itself": (attend_to_the_next_chunk, [FLOW, ORACLE]),
    "no neighbor mask": (ignore_the_neighbor_mask, [MASKED, EMPTY, ORACLE]),
    "no neighbor mask in the encoder": (ignore_the_neighbor_mask_in_the_encoder, [MASKED, ORACLE]),
    "no neighbor mask in CCA": (ignore_the_neighbor_mask_in_cca, [MASKED, EMPTY, ORACLE]),
    "no chunk mask": (ignore_the_chunk_mask, [ORACLE]),
    "causal encoder": (attend_causally_in_the_encoder, [APART, ORACLE]),
    "neighbors mixed in the encoder": (mix_neighbors_in_the_encoder, [APART, ORDER, FLOW, ORACLE]),
    "encoder without distances": (forget_distances_in_the_encoder, [ORACLE]),
    "encoder distances mirrored": (mirror_distances_in_the_encoder, [ORACLE]),
    "distances to the chunk mirrored": (mirror_distances_to_the_chunk, [ORACLE]),
    "chunk states detached": (cut_the_gradient_of_chunk_states, [GRADIENTS]),
    "absolute distances in CCA": (absolute_distances_in_cca, [ORACLE]),
    "CCA distances mirrored": (mirrored_distances_in_cca, [ORACLE]),
    "CCA distances one too long": (distances_in_cca_one_too_long, [ORACLE]),
    "CCA distances without m - 1": (distances_in_cca_without_m, [ORACLE]),
    "CCA without distances": (no_distances_in_cca, [ORACLE]),
    "neighbors placed one after the other": (place_neighbors_one_after_the_other, [ORDER, DUPLICATES, ORACLE]),
    "update without neighbors": (update_chunks_without_neighbors, [EMPTY]),
    "norm after CCA": (norm_after_cca, [ORACLE]),
    "chunk states before attention": (take_chunk_states_before_attention, [ORACLE]),
    "chunk states without residual": (take_chunk_states_from_the_branch, [ORACLE]),
    "chunk states after CCA": (take_chunk_states_after_cca, [ORACLE]),
    "encoder in every layer": (encode_anew_in_every_layer, [ORACLE]),
    "CCA beside attention": (cross_attend_beside_attention, [ORACLE]),
    "CCA twice": (add_cca_twice, [ORACLE]),
    "rows mixed": (share_rows, [FLOW, PADDING, ORACLE]),
    "no causal mask": (see_the_future, [FLOW, ORACLE]),
    "padding counted": (count_columns_instead_of_tokens, [PADDING]),
}


@pytest.mark.parametrize(
    ("name", "check"),
    [(name, check) for name, (_, checks) in MUTATIONS.items() for check in checks],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_mistake_is_caught(name, check, monkeypatch):
    """Each mistake by each check that should see it."""
    assert_red(check, oracle_model(), MUTATIONS[name][0], monkeypatch)


@pytest.mark.parametrize("by", [1, -1])
def test_shifted_attending_chunk_is_caught_in_one_layer(by, monkeypatch):
    """The reach of E_u in a single layer moves with it."""
    model = tiny_retro(cross_attention_layers=[3])
    assert_red(contracts.check_reach_in_one_layer, model, shift_attending_chunks(by), monkeypatch)


NORMS = [name for name, module in oracle_model().named_modules() if isinstance(module, torch.nn.RMSNorm)]


@pytest.mark.parametrize("name", NORMS)
def test_missing_norm_is_caught(name, monkeypatch):
    """Each of the model's norms, by the oracle."""
    assert_red(contracts.check_agrees_with_oracle, oracle_model(), without_norm(name), monkeypatch)


@pytest.mark.parametrize(
    "name", [name for name, _ in oracle_model().named_parameters() if not name.endswith("encoder.embed_tokens.weight")]
)
def test_changed_weight_is_caught(name):
    """Each weight counts: a slightly other one gives other logits than the oracle with the old one."""
    model, other = oracle_model(), oracle_model()
    with torch.no_grad():
        parameter = other.get_parameter(name)
        parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    ids, neighbors = random_ids(1, 14), random_neighbors(1, 3)
    expected = contracts.naive_logits(model, ids, neighbors)
    with torch.no_grad():
        assert (other(ids, **neighbors).logits - expected).abs().max() > 1e-4
