"""What a loader's item is taken for, and how a batch is counted, split, weighted and given to a model."""

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import steep
from steep.batches import Batch, as_batch, forward, with_inputs

X, Y = torch.zeros(12, 3), torch.zeros(12)


@pytest.mark.parametrize(
    ("x", "y", "size"),
    [
        (torch.zeros(192, 2), torch.zeros(192), 192),
        (torch.zeros(192, 2), (torch.zeros(192), torch.zeros(192, 3)), 192),
        (torch.zeros(192, 2), [torch.zeros(192), torch.zeros(192)], 192),
        (torch.zeros(4, 2), {"start": torch.zeros(4), "end": torch.zeros(4)}, 4),
        (torch.zeros(3, 1, 8, 8), [{"boxes": torch.zeros(5, 4)}, {"boxes": torch.zeros(0, 4)}, {}], 3),
        (torch.zeros(7, 2), None, 7),
        ({"ids": torch.zeros(6, 9)}, None, 6),
    ],
)
def test_examples_are_counted_in_nested_batches(x, y, size):
    assert Batch(x, y).size == size


def test_examples_with_two_targets_are_counted_once_each(regression):
    """A mean over 12 examples instead of 40 would weigh the last, shorter batch too much."""

    def data(g):
        def loader(n):
            x = torch.randn(n, 3, generator=g)
            return DataLoader([(row, (row.sum(), row.prod())) for row in x], batch_size=8)

        return steep.Data(loader(40), loader(9))

    def loss(output, target):
        return (output.squeeze(-1) - target[0]).square() + target[1].square()

    result = steep.fit(regression.replace(data=data, loss=loss, budget=steep.Budget(epochs=2)), progress=False)
    assert result.examples == 80
    inputs, targets = zip(*((x, (a, b)) for x, (a, b) in data(torch.Generator().manual_seed(0)).val), strict=True)
    assert [len(x) for x in inputs] == [8, 1]
    assert all(len(t[0]) == len(x) for t, x in zip(targets, inputs, strict=True))


@pytest.mark.parametrize("name", ["loss", "step", "seconds"])
def test_a_metric_cannot_take_the_place_of_the_loss(name):
    with pytest.raises(ValueError, match=f"must not be called '{name}'"):
        steep.Metric(name, lambda output, target: output)


def test_a_metric_is_a_metric_and_one_number_per_example(regression):
    def error(output, target):
        return (output.squeeze(-1) - target).abs()

    with pytest.raises(TypeError, match=r"must be a steep.Metric, got .*metric=steep.Metric\('name', function\)"):
        regression.replace(metric=error)
    averaged = regression.replace(metric=steep.Metric("error", lambda output, target: error(output, target).mean()))
    with pytest.raises(ValueError, match=r"'error' must return one number per example, shape \(10,\), .* \(\)"):
        steep.fit(averaged, progress=False)


INPUTS = ("input_ids", "attention_mask")
IDS, MASK, LABELS = torch.arange(12).view(4, 3), torch.ones(4, 3), torch.tensor([0, 1, 1, 0])
Named = namedtuple("Named", ["x", "target", "weights"])


@pytest.mark.parametrize(
    ("item", "x", "rest"),
    [
        ((IDS, LABELS), IDS, ("y",)),
        ([IDS, LABELS], IDS, ("y",)),
        ((IDS, LABELS, torch.arange(4)), IDS, ("y", "indices")),
        ({"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}, INPUTS, ("y",)),
        (UserDict(input_ids=IDS, attention_mask=MASK, labels=LABELS), INPUTS, ("y",)),
        ({"image": IDS, "label": LABELS, "indices": torch.arange(4)}, IDS, ("y", "indices")),
        ({"x": IDS, "y": LABELS, "weights": torch.ones(4)}, IDS, ("y", "weights")),
        (Named(IDS, LABELS, torch.ones(4)), IDS, ("y", "weights")),
        (Batch(IDS, None, weights=torch.ones(4)), IDS, ("weights",)),
    ],
)
def test_items_are_understood(item, x, rest):
    batch = as_batch(item)
    assert tuple(batch.x) == x if isinstance(x, tuple) else batch.x is x
    assert batch.size == 4
    assert tuple(name for name in ("y", "indices", "weights") if getattr(batch, name) is not None) == rest
    if "y" in rest:
        assert batch.y is LABELS


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (
            IDS,
            r"inputs without targets \(a tensor int64 \(4, 3\)\): use steep.adapt\(loader, lambda item: \(item, item",
        ),
        (torch.zeros(2, 5), "inputs without targets"),  # and not two parts
        ([IDS], r"inputs without targets .*lambda item: \(item\[0\], item\[0\]\)"),
        ((IDS, MASK, LABELS, LABELS), r"yields a tuple of 4 \(a tensor int64 \(4, 3\), .*; steep understands"),
        (
            (IDS, LABELS, torch.rand(4)),
            r"third part of a batch, a tensor float32 \(4,\), cannot be .* indices.*weights=",
        ),
        ((IDS, LABELS, torch.ones(4, 2, dtype=torch.long)), "third part of a batch"),
        ((IDS, LABELS, torch.ones(4, dtype=torch.bool)), "third part of a batch"),
        ((IDS, LABELS, [0, 1, 2, 3]), "third part of a batch, a list of 4"),
        ((IDS.numpy(), LABELS), r"inputs are a NumPy array of shape \(4, 3\)"),
        ((IDS, np.float64(3)), "targets are a NumPy array"),
        ((IDS, torch.tensor(3)), r"targets of a batch are a tensor of shape \(\), with no batch dimension"),
        ({"input_ids": IDS, "mask": MASK}, "dict of input_ids, mask, with no targets"),
        ({"input_ids": IDS, "label": LABELS, "labels": LABELS}, "several that could be the targets: labels, label"),
        ({"labels": LABELS}, "no inputs beside its targets"),
        ([(IDS[0], LABELS[0]), (IDS[1], LABELS[1])], "list of 2 examples that are not joined"),
        ([{"x": IDS[0], "y": LABELS[0]}] * 5, "list of 5 examples that are not joined"),
        (None, "the loader yields None"),
        ("text", "an object of type str"),
        (object(), "an object of type object"),
    ],
)
def test_items_that_are_not_understood_are_refused_with_the_line_to_write(item, says):
    with pytest.raises(TypeError, match=says):
        as_batch(item)


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_a_split_batch_joins_to_the_whole(count):
    boxes = [{"boxes": torch.zeros(i, 4)} for i in range(4)]
    batch = Batch({"ids": IDS, "flag": True, "pair": [IDS, MASK]}, boxes, torch.arange(4), torch.rand(4))
    parts = batch.split(count)
    assert [part.size for part in parts] == {1: [4], 3: [2, 1, 1], 4: [1] * 4, 9: [1] * 4}[count]
    assert torch.equal(torch.cat([part.x["ids"] for part in parts]), IDS)
    assert torch.equal(torch.cat([part.x["pair"][1] for part in parts]), MASK)
    assert all(part.x["flag"] is True for part in parts)
    assert [box for part in parts for box in part.y] == boxes
    assert torch.equal(torch.cat([part.indices for part in parts]), torch.arange(4))
    assert torch.equal(torch.cat([part.weights for part in parts]), batch.weights)


def test_images_of_unlike_size_are_split_by_image():
    images = [torch.zeros(3, size, size) for size in (4, 5, 6)]
    parts = Batch(images, [{"boxes": torch.zeros(1, 4)}] * 3).split(2)
    assert [[image.shape[-1] for image in part.x] for part in parts] == [[4, 5], [6]]


def test_what_has_no_entry_for_each_example_is_not_split():
    with pytest.raises(
        ValueError, match=r"inputs\['bias'\] of a batch of 4 cannot be split .*float32 \(7, 2\).* not have 4"
    ):
        Batch({"ids": IDS, "bias": torch.zeros(7, 2)}, LABELS).split(2)
    with pytest.raises(TypeError, match="cannot tell how many examples a batch of an object of type object holds"):
        Batch(object(), None).split(2)


class Two(nn.Module):
    def forward(self, input_ids, attention_mask=None):
        return input_ids if attention_mask is None else input_ids * attention_mask


class Dicts(nn.Module):
    def forward(self, batch, **options):
        return batch["input_ids"]


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager")], ids=["plain", "compiled"])
def test_inputs_of_several_names_are_given_by_name(wrap):
    x = {"input_ids": IDS, "attention_mask": 0 * IDS}
    assert not forward(wrap(Two()), x).any()
    assert forward(wrap(Dicts()), x) is IDS or torch.equal(forward(wrap(Dicts()), x), IDS)
    with pytest.raises(TypeError, match="Two takes no argument length, token_type_ids, which its batches hold"):
        forward(wrap(Two()), {**x, "token_type_ids": IDS, "length": IDS})


def test_other_inputs_take_the_form_of_the_item():
    for item in ((IDS, LABELS), {"image": IDS, "label": LABELS}, Batch(IDS, LABELS)):
        changed = with_inputs(item, MASK)
        assert type(changed) is type(item)
        assert as_batch(changed).x is MASK
        assert as_batch(changed).y is LABELS


def loader(*tensors, **options):
    return DataLoader(TensorDataset(*tensors), batch_size=4, **options)


def items(x, y, *more):
    """A data factory of 12 training examples, whose loader yields tuples of these parts."""
    return lambda generator: steep.Data(loader(x, y, *more), loader(x[:4].clone(), y[:4]))


CODES = torch.linspace(-1, 1, 12)


@pytest.mark.parametrize(
    ("third", "says"),
    [
        (torch.arange(12) // 4, "0 comes twice in an epoch. If it is something else, say so: steep.adapt"),
        (torch.arange(12) % 4, "0 comes twice in an epoch"),  # distinct within every batch
        (torch.arange(12) + 5, "12 is no index into 12 examples"),
        (-1 - torch.arange(12), "-1 is no index"),
    ],
)
def test_a_third_part_that_is_no_index_is_refused(regression, third, says):
    recipe = regression.replace(data=items(torch.randn(12, 3), CODES, third))
    with pytest.raises(ValueError, match=says):
        steep.fit(recipe, progress=False)


def test_indices_may_repeat_where_the_sampler_draws_with_replacement(regression):
    x, sampler = torch.randn(12, 3), WeightedRandomSampler(torch.ones(12), 24)

    def data(generator):
        drawn = DataLoader(TensorDataset(x, CODES, torch.arange(12)), batch_size=4, sampler=sampler)
        return steep.Data(drawn, loader(x[:4].clone(), CODES[:4]))

    assert steep.fit(regression.replace(data=data), progress=False).examples == 4 * 24


def test_what_is_said_by_name_is_not_checked(regression):
    plain = items(torch.randn(12, 3), CODES, torch.arange(12) // 2)(None)
    named = steep.Data(steep.adapt(plain.train, lambda item: Batch(*item)), plain.val)
    assert steep.fit(regression.replace(data=lambda generator: named), progress=False).examples == 4 * 12


def test_weights_of_whole_numbers_are_repeated_examples(regression):
    """Losses times 0, 1, 2: the gradient's sum is that of none, one and two copies; and so are the scores."""
    x, y = torch.randn(12, 3), torch.randn(12)
    counts = torch.tensor([0, 1, 2] * 4)
    deterministic = regression.replace(
        model=lambda: nn.Linear(3, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.01), scheduler=None
    )

    def data(x, y, weights):
        def batches(generator):
            whole = [Batch(x, y, weights=weights)]
            return steep.Data(whole, [Batch(part.x, part.y, weights=part.weights) for part in whole[0].split(5)])

        return batches

    weighted = deterministic.replace(data=data(x, y, counts.float()), budget=steep.Budget(steps=7))
    copies = x.repeat_interleave(counts, 0), y.repeat_interleave(counts)
    repeated = weighted.replace(data=data(*copies, torch.ones(12)))
    one, two, parts = (
        steep.fit(r, progress=False, **o) for r, o in [(weighted, {}), (repeated, {}), (weighted, {"accumulate": 3})]
    )
    for other in (two, parts):
        torch.testing.assert_close(list(other.model.parameters()), list(one.model.parameters()))
        assert other.val["loss"] == pytest.approx(one.val["loss"], rel=1e-5)
    unweighted = steep.fit(weighted.replace(data=data(x, y, None)), progress=False)
    assert unweighted.val["loss"] != pytest.approx(one.val["loss"], rel=1e-3)


def test_weights_need_one_loss_per_example(regression):
    recipe = regression.replace(
        data=lambda g: steep.Data([Batch(X, Y, weights=torch.ones(12))], [(X, Y)]),
        loss=lambda o, t: (o[:, 0] - t).mean(),
    )
    with pytest.raises(ValueError, match=r"weights of shape \(12,\) need one loss per example, .* returned shape \(\)"):
        steep.fit(recipe, progress=False)


def test_indexed_dicts_get_indices():
    rows = [{"input_ids": torch.full((3,), i), "labels": i % 2} for i in range(6)]
    batch = as_batch(next(iter(DataLoader(steep.Indexed(rows), batch_size=4))))
    assert batch.indices.tolist() == [0, 1, 2, 3]
    assert batch.y.tolist() == [0, 1, 0, 1]
    assert batch.x.shape == (4, 3)


def test_adapt_keeps_what_the_loader_has():
    inner = steep.tensor_loader(X, Y, 5, shuffle=True)
    adapted = steep.adapt(inner, lambda item: (item[0] + 1, item[1], item[2]))
    assert len(adapted) == 3
    assert adapted.dataset is inner.dataset
    assert steep.splits.count_examples(adapted) == 12
    assert next(iter(adapted)).x.min() == 1
    with pytest.raises(TypeError, match=r"adapt\(loader, function\) got None"):
        steep.adapt(None, len)
    with pytest.raises(TypeError, match="a tuple of 4"):
        next(iter(steep.adapt(inner, lambda item: (*item, item[0]))))
