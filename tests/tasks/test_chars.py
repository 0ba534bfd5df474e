"""`chars`: windows of the text, shifted targets, and that the transformer learns more than letter frequencies."""

import torch

import steep
from steep.tasks import task
from steep.tasks.chars import _corpus


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def decode(ids):
    return "".join(_corpus()[1][i] for i in ids.tolist())


def test_the_corpus_is_the_help_text():
    from pydoc_data.topics import topics

    ids, alphabet = _corpus()
    text = decode(ids)
    assert len(text) > 300_000
    assert all(topics[name] in text for name in ("lambda", "yield", "atom-identifiers"))
    assert len(set(alphabet)) == len(alphabet) == int(ids.max()) + 1
    assert list(alphabet) == sorted(alphabet)


def test_targets_are_the_next_characters():
    x, y, _ = task("chars").data(generator()).train.dataset[:]
    assert x.shape == y.shape
    assert x.shape[1] == 32
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert decode(torch.cat([x[0], y[0, -1:]])) in decode(_corpus()[0])


def test_windows_do_not_overlap_and_are_used_once():
    data = task("chars").data(generator())
    parts = [loader.dataset[:] for loader in (data.train, data.val, data.test)]
    windows = torch.cat([torch.cat([x, y[:, -1:]], 1) for x, y, _ in parts])
    text = _corpus()[0]
    whole = text[: len(text) // 33 * 33].view(-1, 33)
    assert sorted(map(tuple, windows.tolist())) == sorted(map(tuple, whole.tolist()))
    share = [len(x) / len(windows) for x, *_ in parts]
    assert abs(share[1] - 0.02) < 0.001
    assert abs(share[2] - 1 / 12) < 0.001


def test_context_is_an_option():
    recipe = task("chars", context=16, batch_size=8)
    x, _, _ = next(iter(recipe.data(generator()).train))
    assert x.shape == (8, 16)
    assert recipe.model().position.weight.shape[0] == 16


def test_the_loss_is_in_nats_per_character():
    recipe = task("chars")
    x, y, _ = next(iter(recipe.data(generator()).train))
    uniform = torch.zeros(*x.shape, len(_corpus()[1]))
    expected = torch.full((len(x),), float(len(_corpus()[1]))).log()
    torch.testing.assert_close(recipe.loss(uniform, y), expected)


def test_learning_goes_beyond_letter_frequencies():
    """Entropy of single characters is the best that any model without context can do."""
    share = _corpus()[0].bincount().double() / len(_corpus()[0])
    entropy = -(share * share.log()).sum().item()
    recipe = task("chars", steps=120)
    loss = steep.fit(recipe, progress=False, evaluate_every=1000).val["loss"]
    assert loss < entropy - 0.4
