"""Rows against a naive loop over the examples, in float64, over a zoo of architectures."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest

from steep.per_example import PerExample

SPEC = importlib.util.spec_from_file_location("zoo", Path(__file__).with_name("zoo.py"))
zoo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(zoo)
build, jacobian, check = zoo.build, zoo.jacobian, zoo.check


pytestmark = pytest.mark.usefixtures("seeded_and_quiet")


@pytest.mark.parametrize("name", zoo.ZOO)
def test_rows_equal_a_loop_over_examples(name):
    model, x = build(name)
    engine = PerExample(model)
    for _ in range(2):  # the first batch is checked and may be routed anew; the second is not
        losses = zoo.losses_of(model, x)
        j = jacobian(losses, [p for p in model.parameters() if p.requires_grad])
        check(engine.rows(losses), j)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_rows_do_not_depend_on_the_chunk(name, tiny_chunks):
    model, x = build(name)
    engine = PerExample(model)
    losses = zoo.losses_of(model, x)
    j = jacobian(losses, [p for p in model.parameters() if p.requires_grad])
    check(engine.rows(losses), j)


NEED_THE_CHECK = {
    "time_first_linear_with_as_many_positions_as_examples",
    "lstm_with_projected_states",
    "recurrence_with_computed_weights",
    "bag_scaled_by_frequency",
    "layer_with_a_buffer_that_it_changes",
}
"""Where shapes cannot tell, where `vmap` cannot go, what depends on the batch, and what does not do the same twice."""


@pytest.mark.parametrize("name", sorted(zoo.ZOO.keys() - NEED_THE_CHECK))
def test_the_records_suffice_without_a_comparison(name):
    model, x = build(name)
    engine = PerExample(model, check=False)
    losses = zoo.losses_of(model, x)
    j = jacobian(losses, [p for p in model.parameters() if p.requires_grad])
    check(engine.rows(losses), j)


def test_the_zoo_is_no_monoculture():
    kinds = set()
    for name in zoo.ZOO:
        model, x = build(name)
        engine = PerExample(model)
        kinds |= {type(part).__name__ for part in engine.rows(zoo.losses_of(model, x)).parts}
    assert kinds == {"Outer", "Dense", "Patches", "Lookup", "Uses", "Blocks"}


FAST = [
    "mlp",
    "in_place_activation_behind_a_view",
    "cnn_with_group_norm",
    "convolution_with_groups_stride_dilation",
    "padding_modes",
    "convolution_of_sequences",
    "layer_norms",
    "batch_norm_with_running_statistics",
    "embedding_with_padding",
    "tied_embedding_and_head",
    "reused_layers",
    "one_weight_with_two_biases",
    "transformer_block",
    "frozen_convolution_and_norms",
    "channels_last",
    "windows_in_the_batch_dimension",
    "trees_in_and_out",
    "instance_and_rms_norm",
    "instance_norms_of_all_kinds",
    "rms_norms",
    "bag_of_tokens",
    "bag_whose_mean_counts_no_padding",
    "bag_of_the_largest",
    "bags_of_different_lengths",
    "attention",
    "attention_whose_weights_count",
    "attention_time_first_with_as_many_positions_as_examples",
    "attention_with_masks",
    "causal_attention_in_evaluation_mode",
    "cross_attention",
    "cross_attention_of_three_widths_time_first",
    "attention_frozen_in_part",
    "transformer_with_encoder_and_decoder",
    "recurrent",
    "lstm_of_two_layers_in_both_directions",
    "lstm_whose_states_count_time_first",
    "gru_from_a_state_of_its_own",
    "lstm_from_states_of_its_own",
    "gru_without_bias",
    "plain_recurrence_used_twice",
    "recurrence_with_a_frozen_weight",
    "recurrence_of_windows_in_the_batch_dimension",
    "input_that_needs_a_gradient",
]


@pytest.mark.parametrize("name", FAST)
def test_closed_forms_are_used_where_there_are_some(name):
    model, x = build(name)
    rows = PerExample(model).rows(zoo.losses_of(model, x))
    assert "Blocks" not in {type(part).__name__ for part in rows.parts}


@pytest.mark.parametrize(
    "name", ["gpt_with_shared_positions", "vit_with_class_token", "attention_with_keys_of_its_own", "custom_layer"]
)
def test_no_backward_per_example_where_a_layer_or_a_broadcast_can_be_differentiated_alone(name):
    model, x = build(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="each step takes")
        PerExample(model).rows(zoo.losses_of(model, x))


@pytest.mark.parametrize(
    ("name", "slow"),
    [
        ("parameters_outside_layers", "scale"),
        ("lstm_with_projected_states", "lstm.weight_hr_l0"),
        ("packed_sequences", "gru.weight_ih_l0"),
        ("dropout_between_recurrent_layers", "lstm.weight_ih_l0"),
        ("derivative_in_the_loss", "net.0.weight"),
        ("dropout_in_attention", "self_attn.in_proj_weight"),
    ],
)
def test_the_slow_way_is_announced_once_with_the_parameters_names(name, slow):
    model, x = build(name)
    engine = PerExample(model)
    with pytest.warns(UserWarning, match=slow):
        engine.rows(zoo.losses_of(model, x))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="each step takes")
        engine.rows(zoo.losses_of(model, x))
