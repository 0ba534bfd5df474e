"""Small architectures with everything that per-example gradients can trip over, and the naive way to their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

B = 5
ZOO: dict[str, Callable[[], tuple[nn.Module, Any]]] = {}


def entry(build: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], tuple[nn.Module, Any]]:
    ZOO[build.__name__] = build
    return build


def losses_of(model: nn.Module, x: Any) -> Tensor:
    """One number per example: the sum of squares of its outputs, with a curvature that differs among examples."""
    out = model(x)
    flat = torch.cat([o.flatten(1) for o in out], 1) if isinstance(out, tuple) else out.flatten(1)
    return (flat.square() + 0.3 * flat).sum(1)


class Apply(nn.Module):
    """A module made of a function of itself and its input, with these submodules and parameters."""

    def __init__(self, function: Callable[[Any, Any], Any], **members: Any):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def images(*shape: int) -> Tensor:
    return torch.randn(B, *shape)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def tokens(vocabulary: int, length: int) -> Tensor:
    return torch.randint(vocabulary, (B, length))


@entry
def mlp():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), images(3)


@entry
def mlp_without_bias_on_positions():
    return nn.Sequential(nn.Linear(3, 6, bias=False), nn.GELU(), nn.Linear(6, 2)), images(4, 3)


@entry
def wide_linear_on_few_positions():
    return nn.Linear(20, 30), images(2, 20)


@entry
def in_place_activation_behind_a_view():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)), images(4, 3)


@entry
def cnn_with_group_norm():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    ), images(3, 8, 8)


@entry
def convolution_with_groups_stride_dilation():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, stride=2, padding=2, dilation=2), nn.Conv2d(8, 8, 2, groups=8, bias=False)
    ), images(4, 7, 9)


@entry
def deep_convolution_kept_as_patches():
    return nn.Conv2d(6, 10, (3, 2), dilation=(1, 2), padding=(1, 0)), images(6, 3, 4)


@entry
def padding_modes():
    modes = ("reflect", "replicate", "circular")
    return nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode=m) for m in modes)), images(2, 5, 6)


@entry
def padding_same_and_valid():
    return nn.Sequential(
        nn.Conv2d(2, 3, (3, 5), padding="same", dilation=(1, 2)), nn.Conv2d(3, 2, 3, padding="valid")
    ), images(2, 6, 7)


@entry
def convolution_of_sequences():
    return nn.Sequential(nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 3, groups=2)), images(2, 9)


@entry
def transposed_convolution():
    return nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2), nn.Conv2d(3, 2, 2)), images(2, 3, 3)


@entry
def volumes():
    first = nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0), dilation=(1, 1, 2))
    return nn.Sequential(first, nn.ReLU(), nn.Conv3d(4, 4, 2, groups=2, bias=False)), images(2, 3, 5, 3)


@entry
def transposed_convolutions_of_all_kinds():
    return nn.Sequential(
        nn.ConvTranspose1d(4, 6, 3, stride=3, padding=1, output_padding=2, dilation=2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose1d(6, 2, 2, bias=False),
    ), images(4, 4)


@entry
def transposed_volumes():
    return nn.ConvTranspose3d(2, 3, (2, 1, 3), stride=(2, 1, 2), padding=(1, 0, 1), output_padding=(1, 0, 0)), images(
        2, 2, 3, 2
    )


@entry
def layer_norms():
    return nn.Sequential(nn.LayerNorm((4, 6)), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)), images(4, 6)


@entry
def batch_norm_with_running_statistics():
    norm = nn.BatchNorm2d(3)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(2, 3, 2), norm.eval(), nn.BatchNorm2d(3).eval()), images(2, 4, 4)


@entry
def instance_and_rms_norm():
    return nn.Sequential(
        nn.Conv1d(2, 4, 2), nn.InstanceNorm1d(4, affine=True), nn.Flatten(), nn.RMSNorm(20), nn.Linear(20, 2)
    ), images(2, 6)


@entry
def instance_norms_of_all_kinds():
    volume, running = nn.InstanceNorm3d(2, affine=True), nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
    running.running_mean.normal_()
    fixed = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
    fixed.running_var.uniform_(0.5, 2)
    return Apply(
        lambda m, x: m.fixed(m.running(m.volume(m.conv(x)).flatten(3)).flatten(2)),
        conv=nn.Conv3d(1, 2, 1),
        volume=volume,
        running=running,
        fixed=fixed.eval(),
    ), images(1, 3, 2, 2)


@entry
def instance_norm_without_batch_dimension():
    norm = nn.InstanceNorm1d(2, affine=True)
    return Apply(lambda m, x: m.norm(m.conv(x[0]))[None], conv=nn.Conv1d(2, 2, 2), norm=norm), torch.randn(1, 2, 6)


@entry
def rms_norms():
    return nn.Sequential(
        nn.RMSNorm((4, 6), eps=1e-3), nn.Linear(6, 6), nn.RMSNorm(6), nn.RMSNorm(6, elementwise_affine=False)
    ), images(4, 6)


@entry
def embedding_with_padding():
    return nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(24, 2)), tokens(7, 6)


@entry
def embedding_of_rare_tokens():
    return nn.Embedding(500, 3), tokens(500, 2)


@entry
def embedding_that_shortens_its_vectors():
    embedding = nn.Embedding(7, 4, max_norm=1.0)
    return Apply(lambda m, x: m.embedding(x) * m.embedding(x.flip(1)), embedding=embedding), tokens(7, 3)


@entry
def embedding_scaled_by_frequency():
    return nn.Sequential(nn.Embedding(7, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(8, 2)), tokens(7, 2)


@entry
def bag_of_tokens():
    return nn.Sequential(nn.EmbeddingBag(7, 4, mode="sum"), nn.Linear(4, 2)), tokens(7, 6)


@entry
def bag_whose_mean_counts_no_padding():
    x = tokens(4, 6)
    x[2] = 0
    return nn.Sequential(nn.EmbeddingBag(7, 4, padding_idx=0), nn.Tanh()), x


@entry
def bag_of_the_largest():
    return nn.Sequential(nn.EmbeddingBag(7, 4, mode="max", padding_idx=1), nn.Linear(4, 2)), tokens(7, 5)


@entry
def bags_of_different_lengths():
    def bags(m, x):
        inside = torch.arange(4) < x["lengths"][:, None]
        words, weights, ends = x["tokens"][inside], x["weights"][inside], x["lengths"].cumsum(0)
        starts = ends - x["lengths"]
        ends = torch.cat([starts[:1], ends])
        return m.mean(words, starts), m.sum(words, offsets=ends, per_sample_weights=weights), m.max(words, starts)

    return Apply(
        bags,
        mean=nn.EmbeddingBag(7, 4),
        sum=nn.EmbeddingBag(7, 4, mode="sum", include_last_offset=True),
        max=nn.EmbeddingBag(7, 4, mode="max"),
    ), {"tokens": tokens(7, 4), "weights": images(4), "lengths": torch.tensor([3, 0, 1, 4, 3])}


@entry
def bag_scaled_by_frequency():
    return nn.Sequential(nn.EmbeddingBag(7, 4, mode="sum", scale_grad_by_freq=True), nn.Linear(4, 2)), tokens(7, 6)


def tie(a: nn.Module, b: nn.Module) -> nn.Module:
    b.weight = a.weight
    return b


@entry
def tied_embedding_and_head():
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7)
    mix = nn.Linear(4, 4)
    return nn.Sequential(embedding, mix, nn.Tanh(), tie(embedding, head)), tokens(7, 3)


@entry
def reused_layers():
    linear, conv = nn.Linear(4, 4), nn.Conv2d(2, 2, 3, padding=1)
    return Apply(
        lambda m, x: m.linear(torch.tanh(m.linear(m.conv(torch.tanh(m.conv(x)))))), linear=linear, conv=conv
    ), images(2, 3, 4)


@entry
def reused_norm_and_embedding():
    return Apply(
        lambda m, x: m.norm(m.embedding(x) + m.norm(m.embedding(x.flip(1)))),
        norm=nn.LayerNorm(4),
        embedding=nn.Embedding(7, 4),
    ), tokens(7, 3)


@entry
def one_weight_with_two_biases():
    a = nn.Linear(4, 4)
    return nn.Sequential(a, nn.Tanh(), tie(a, nn.Linear(4, 4))), images(4)


@entry
def weight_used_by_layer_and_function():
    return Apply(lambda m, x: F.linear(torch.tanh(m.linear(x)), m.linear.weight.T), linear=nn.Linear(4, 6)), images(4)


def attend(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(m.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return m.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def block(width: int) -> Apply:
    mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    attention = Apply(attend, norm=nn.LayerNorm(width), qkv=nn.Linear(width, 3 * width), out=nn.Linear(width, width))
    return Apply(lambda m, x: (y := x + m.attention(x)) + m.mlp(y), attention=attention, mlp=mlp)


@entry
def transformer_block():
    return block(8), images(6, 8)


def gpt(length: int) -> Apply:
    token, head = nn.Embedding(7, 8), nn.Linear(8, 7, bias=False)
    return Apply(
        lambda m, x: m.head(m.block(m.token(x) + m.position(torch.arange(x.shape[1])))),
        token=token,
        position=nn.Embedding(length, 8),
        block=block(8),
        head=tie(token, head),
    )


@entry
def gpt_with_shared_positions():
    return gpt(6), tokens(7, 6)


@entry
def gpt_with_as_many_positions_as_examples():
    return gpt(B), tokens(7, B)


@entry
def vit_with_class_token():
    return Apply(
        lambda m, x: m.block(
            torch.cat([m.token.expand(len(x), -1, -1), m.patch(x).flatten(2).mT], 1) + m.position(m.grid)[None]
        ),
        patch=nn.Conv2d(3, 8, 2, stride=2),
        token=parameter(1, 1, 8),
        position=nn.Linear(2, 8),
        grid=torch.randn(5, 2, dtype=torch.float64),
        block=block(8),
    ), images(3, 4, 4)


@entry
def attention():
    return Apply(
        lambda m, x: m.attention(x, x, x, need_weights=False)[0],
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
    ), images(4, 8)


@entry
def attention_whose_weights_count():
    return Apply(lambda m, x: m.attention(x, x, x), attention=nn.MultiheadAttention(8, 2, batch_first=True)), images(
        4, 8
    )


@entry
def attention_time_first():
    return Apply(
        lambda m, x: m.attention(*3 * (x.transpose(0, 1),))[0].transpose(0, 1), attention=nn.MultiheadAttention(8, 2)
    ), images(4, 8)


@entry
def attention_time_first_with_as_many_positions_as_examples():
    model, _ = attention_time_first()
    return model, images(B, 8)


@entry
def time_first_linear_with_as_many_positions_as_examples():
    return Apply(lambda m, x: m.linear(x.transpose(0, 1)).transpose(0, 1), linear=nn.Linear(3, 2)), images(B, 3)


@entry
def attention_with_masks():
    def masked(m, given):
        x, lengths = given
        padding = torch.arange(4) >= lengths[:, None]
        causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
        return m.attention(x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=False)[0]

    model = Apply(masked, attention=nn.MultiheadAttention(8, 2, bias=False, batch_first=True))
    return model, (images(4, 8), torch.tensor([4, 2, 3, 4, 1]))


@entry
def causal_attention_in_evaluation_mode():
    def causal(m, x):
        mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
        return m.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]

    return Apply(causal, attention=nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True)).eval(), images(4, 8)


@entry
def attention_whose_heads_weights_count():
    return Apply(
        lambda m, x: m.attention(x, x, x, average_attn_weights=False)[1],
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
    ), images(4, 8)


@entry
def cross_attention():
    return Apply(
        lambda m, x: m.attention(m.ask(x[0]), x[1], value=x[1])[0],
        ask=nn.Linear(3, 8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
    ), (images(3, 3), images(4, 8))


@entry
def cross_attention_of_three_widths_time_first():
    return Apply(
        lambda m, x: m.attention(*(t.transpose(0, 1) for t in x))[0].transpose(0, 1),
        attention=nn.MultiheadAttention(8, 4, kdim=3, vdim=5),
    ), (images(3, 8), images(4, 3), images(4, 5))


@entry
def attention_frozen_in_part():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.in_proj_weight.requires_grad_(False)
    attention.out_proj.bias.requires_grad_(False)
    return Apply(lambda m, x: m.attention(x, x, x)[0], attention=attention), images(4, 8)


@entry
def attention_with_computed_weights():
    a, b = (nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
    nn.utils.weight_norm(a, "in_proj_weight")
    weight_norm(b.out_proj)
    return Apply(lambda m, x: m.b(*3 * (m.a(x, x, x)[0],))[0], a=a, b=b), images(3, 4)


@entry
def recurrence_with_computed_weights():
    a, b = nn.GRU(3, 4, batch_first=True), nn.RNN(4, 4, batch_first=True)
    nn.utils.weight_norm(a, "weight_hh_l0")
    weight_norm(b, "weight_hh_l0")
    return Apply(lambda m, x: m.b(m.a(x)[0])[0], a=a, b=b), images(3, 3)


@entry
def attention_without_batch_dimension():
    return Apply(lambda m, x: m.attention(*3 * (x[0],))[0][None], attention=nn.MultiheadAttention(8, 2)), (
        torch.randn(1, 4, 8)
    )


@entry
def attention_with_keys_of_its_own():
    return Apply(
        lambda m, x: m.attention(x, x, x)[0],
        attention=nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True),
    ), images(3, 4)


@entry
def transformer_with_encoder_and_decoder():
    model = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True)
    return Apply(lambda m, x: m.transformer(*x), transformer=model), (images(3, 8), images(4, 8))


@entry
def encoder_layer():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), images(4, 8)


@entry
def dropout_in_attention():
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True), images(3, 4)


@entry
def recurrent():
    return Apply(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(3, 4, batch_first=True)), images(4, 3)


@entry
def lstm_of_two_layers_in_both_directions():
    return Apply(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)), images(4, 3)


@entry
def lstm_whose_states_count_time_first():
    def states(m, x):
        out, (h, c) = m.lstm(x.transpose(0, 1))
        return m.head(out[-1] + h[0]), c[1]

    return Apply(states, lstm=nn.LSTM(3, 4, 2), head=nn.Linear(4, 2)), images(B, 3)


@entry
def gru_from_a_state_of_its_own():
    def decode(m, x):
        return m.head(m.gru(x, torch.tanh(m.encode(x.sum(1)))[None].tile(2, 1, 1))[1][-1])

    return Apply(
        decode, encode=nn.Linear(3, 4), gru=nn.GRU(3, 4, batch_first=True, bidirectional=True), head=nn.Linear(4, 2)
    ), images(4, 3)


@entry
def lstm_from_states_of_its_own():
    def decode(m, x):
        h, c = m.encode(x.mean(1))[None].expand(2, -1, -1).chunk(2, 2)
        return m.lstm(x, (h, c))[0]

    return Apply(decode, encode=nn.Linear(3, 8), lstm=nn.LSTM(3, 4, 2, batch_first=True)), images(4, 3)


@entry
def gru_without_bias():
    return Apply(lambda m, x: m.gru(x)[0], gru=nn.GRU(3, 4, 2, bias=False, batch_first=True)), images(3, 3)


@entry
def plain_recurrence_used_twice():
    rnn = nn.RNN(4, 4, nonlinearity="relu", batch_first=True)
    rnn.bias_hh_l0.requires_grad_(False)
    return Apply(lambda m, x: m.rnn(m.rnn(x)[0])[0], rnn=rnn), images(3, 4)


@entry
def recurrence_with_a_frozen_weight():
    lstm = nn.LSTM(3, 4, batch_first=True)
    lstm.weight_ih_l0.requires_grad_(False)
    return Apply(lambda m, x: m.lstm(x)[0], lstm=lstm), images(3, 3)


@entry
def recurrence_of_windows_in_the_batch_dimension():
    return Apply(
        lambda m, x: m.gru(x.flatten(0, 1))[0].unflatten(0, (-1, 2)), gru=nn.GRU(3, 4, batch_first=True)
    ), images(2, 3, 3)


@entry
def lstm_with_projected_states():
    return Apply(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(3, 4, batch_first=True, proj_size=2)), images(3, 3)


@entry
def dropout_between_recurrent_layers():
    return Apply(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(3, 2, 2, batch_first=True, dropout=0.3)), images(3, 3)


@entry
def packed_sequences():
    def padded(m, given):
        packed = nn.utils.rnn.pack_padded_sequence(*given, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(m.gru(packed)[0], True)[0]

    return Apply(padded, gru=nn.GRU(3, 2, batch_first=True)), (images(4, 3), torch.tensor([2, 4, 1, 3, 4]))


@entry
def cells():
    def steps(m, x):
        h, (a, c) = x.new_zeros(len(x), 2), (x.new_zeros(len(x), 2),) * 2
        for one in x.unbind(1):
            h = m.gru(one, h)
            a, c = m.lstm(h, (a, c))
        return a

    return Apply(steps, gru=nn.GRUCell(3, 2), lstm=nn.LSTMCell(2, 2)), images(3, 3)


@entry
def parameters_outside_layers():
    return Apply(
        lambda m, x: m.linear(x * m.gain) * m.scale + m.offset,
        linear=nn.Linear(3, 3),
        gain=parameter(3),
        scale=nn.Parameter(torch.tensor(1.5)),
        offset=parameter(3),
    ), images(3)


@entry
def offset_with_a_factor():
    return Apply(
        lambda m, x: torch.add(m.linear(x), m.offset, alpha=2), linear=nn.Linear(3, 3), offset=parameter(3)
    ), images(3)


@entry
def offset_of_an_offset():
    return Apply(
        lambda m, x: m.linear(x) + (m.rows + m.offset),
        linear=nn.Linear(3, 3),
        rows=parameter(4, 3),
        offset=parameter(3),
    ), images(4, 3)


@entry
def weight_that_is_a_sum():
    return Apply(
        lambda m, x: F.linear(m.linear(x), m.matrix + m.row),
        linear=nn.Linear(3, 3),
        matrix=parameter(4, 3),
        row=parameter(3),
    ), images(3)


@entry
def layer_that_hands_on_its_input():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = parameter(4)

        def forward(self, x):
            return x

    return nn.Sequential(nn.Linear(3, 4), Switch(), nn.Linear(4, 2)), images(3)


@entry
def offset_added_twice():
    return Apply(lambda m, x: m.linear(x + m.offset) + m.offset, linear=nn.Linear(3, 3), offset=parameter(3)), images(3)


@entry
def parametrized_weight():
    return nn.Sequential(weight_norm(nn.Linear(3, 6)), nn.PReLU(6), nn.Linear(6, 2)), images(3)


@entry
def parametrized_bias_and_weight_computed_by_a_hook():
    return nn.Sequential(
        weight_norm(nn.Linear(3, 6), "bias", dim=None), nn.utils.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 2)
    ), images(3)


@entry
def layer_with_a_buffer_that_it_changes():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.register_buffer("calls", torch.zeros(2, dtype=torch.float64))

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (1 + 0.1 * self.calls)

    return nn.Sequential(nn.Linear(3, 3), Counting()), images(3)


@entry
def custom_layer():
    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.form = parameter(3, 4, 4)

        def forward(self, x):
            return torch.einsum("bi,oij,bj->bo", x, self.form, x)

    return nn.Sequential(nn.Linear(3, 4), Quadratic(), nn.Linear(3, 2)), images(3)


@entry
def linear_with_a_forward_of_its_own():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    return nn.Sequential(Doubled(3, 4), nn.Tanh(), nn.Linear(4, 2)), images(3)


@entry
def custom_function():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x**3 * weight

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            assert grad.abs().max().item() >= 0  # no vmap over this
            return grad * 3 * x**2 * weight, (grad * x**3).sum(0)

    return Apply(lambda m, x: m.linear(Cube.apply(x, m.weight)), linear=nn.Linear(3, 2), weight=parameter(3)), images(3)


@entry
def frozen_and_unused_parameters():
    a, b, c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    a.weight.requires_grad_(False)
    b.requires_grad_(False)
    c.bias.requires_grad_(False)
    return Apply(lambda m, x: m.c(m.b(torch.tanh(m.a(x)))), a=a, b=b, c=c, unused=nn.Linear(3, 3)), images(3)


@entry
def frozen_convolution_and_norms():
    conv, norm, other = nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.LayerNorm(3)
    conv.weight.requires_grad_(False)
    norm.weight.requires_grad_(False)
    other.bias.requires_grad_(False)
    return nn.Sequential(conv, norm, other), images(2, 4, 4)


@entry
def single_example():
    model, x = cnn_with_group_norm()
    return model, x[:1]


@entry
def single_example_without_batch_dimension():
    return Apply(lambda m, x: m.head(m.conv(x[0]).flatten())[None], conv=nn.Conv2d(2, 3, 2), head=nn.Linear(27, 2)), (
        torch.randn(1, 2, 4, 4)
    )


@entry
def non_contiguous_input():
    model, _ = mlp_without_bias_on_positions()
    return model, torch.randn(3, 2 * B, 4).permute(1, 2, 0)[::2]


@entry
def channels_last():
    model, x = cnn_with_group_norm()
    return model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


@entry
def windows_in_the_batch_dimension():
    return Apply(
        lambda m, x: m.norm(m.conv(m.linear(x.flatten(0, 1)).unsqueeze(-1))).unflatten(0, (-1, 3)),
        linear=nn.Linear(4, 4),
        conv=nn.Conv2d(2, 8, (2, 1)),
        norm=nn.GroupNorm(2, 8),
    ), images(3, 2, 4)


@entry
def trees_in_and_out():
    return Apply(lambda m, x: (m.a(x["a"]), m.b(input=x["b"][0])), a=nn.Linear(3, 2), b=nn.Embedding(7, 3)), {
        "a": images(3),
        "b": (tokens(7, 2),),
    }


@entry
def bilinear_of_two_inputs():
    return Apply(lambda m, x: m.pair(x[0], input2=x[1]), pair=nn.Bilinear(3, 4, 2)), (images(3), images(4))


@entry
def derivative_in_the_loss():
    def with_slope(m, x):
        x = x.clone().requires_grad_()
        y = m.net(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y, slope

    return Apply(with_slope, net=nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))), images(2)


@entry
def input_that_needs_a_gradient():
    return Apply(
        lambda m, x: m.net(2 * x.clone().requires_grad_()), net=nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2))
    ), images(3)


# ---- rows by a loop over the losses


def build(name):
    """The model and its input, in float64."""

    def double(t):
        return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    model, x = ZOO[name]()
    return model.double(), torch.utils._pytree.tree_map(double, x)


def jacobian(losses, params):
    """One ordinary backward per loss, in the order of the memory; (number of losses, P)."""
    rows = []
    for loss in losses.flatten():
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        rows.append(flatten(params, grads))
    return torch.stack(rows)


def flatten(params, tensors):
    return torch.cat(
        [(torch.zeros_like(p) if t is None else t).flatten() for p, t in zip(params, tensors, strict=True)]
    )


def check(rows, j):
    """Compare all that can be asked of rows with the matrix."""
    w = torch.randn(len(j), dtype=torch.float64)
    v = [torch.randn_like(p) for p in rows.params]
    same(rows.gram(), j @ j.T)
    same(rows.norms(), j.norm(dim=1))
    same(flatten(rows.params, rows.vjp(w)), w @ j)
    same(rows.jvp(v), j @ flatten(rows.params, v))
    same(flatten(rows.params, rows.columnwise(lambda columns: columns.amax(0))), j.amax(0))


def same(found, expected):
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
