"""Batches as other libraries make them train as in a loop by hand: texts with masks, lengths, lists of boxes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, random_split

import steep
from steep.backward import Sven
from steep.tasks._files import data_directory

STEPS = 4


def fit(recipe, **options):
    return steep.fit(recipe, progress=False, **options)


def assert_equal_models(a, b, **tolerance):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def by_hand(recipe, losses):
    """The recipe's first steps as a plain loop over the same batches, from the same initial model."""
    batches = []

    def watched(item):
        batches.append(item)
        return item

    def data(generator):
        parts = recipe.data(generator)
        return steep.Data(steep.adapt(parts.train, watched), parts.val)

    still = recipe.replace(data=data, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    model = fit(still).model
    optimizer = recipe.optimizer(list(model.parameters()))
    for batch in batches[1 : STEPS + 1]:  # one is looked at before the first step
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()
    return model


# texts with transformers -------------------------------------------------------------------------------------------


def made_messages():
    """Messages of two kinds, told apart by a few of their words."""
    rng = np.random.default_rng(0)
    common = ["are", "you", "at", "home", "now", "i", "will", "call", "when", "the", "bus", "comes", "see"]
    spam = ["win", "free", "prize", "cash", "claim"]
    for _ in range(60):
        label = int(rng.random() < 0.4)
        words = [*rng.choice(common, rng.integers(2, 9)), *(rng.choice(spam, 2) if label else ())]
        yield " ".join(rng.permutation(words)), label


def sms():
    path = data_directory() / "text" / "sms_spam.tsv"
    if not path.exists():
        pytest.skip(f"{path} is missing: the SMS Spam Collection, a label and a message on each line")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(text, int(label == "spam")) for label, _, text in (line.partition("\t") for line in lines) if text][:60]


def text_recipe(family, messages=None):
    transformers = pytest.importorskip("transformers", reason="needs the extra steep[hf]")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    messages = list(messages or made_messages())
    raw = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]"]
    raw.train_from_iterator(
        (text for text, _ in messages),
        trainers.WordLevelTrainer(vocab_size=300, special_tokens=special, show_progress=False),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
    examples = [{**tokenizer(text, truncation=True, max_length=24), "labels": label} for text, label in messages]
    collate = transformers.DataCollatorWithPadding(tokenizer)
    common = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    if family == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config, kind = transformers.BertConfig(**common, **sizes), transformers.BertForSequenceClassification
    else:
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
        config, kind = transformers.GPT2Config(**common, **sizes), transformers.GPT2ForSequenceClassification
    for rate in ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, rate):
            setattr(config, rate, 0.0)

    def data(generator):
        parts = random_split(examples, [40, 10, 10], generator=generator)
        return steep.Data(
            *(
                DataLoader(steep.Indexed(p), batch_size=8, shuffle=i == 0, collate_fn=collate)
                for i, p in enumerate(parts)
            )
        )

    return steep.Recipe(
        data=data,
        model=lambda: kind(config),
        loss=lambda output, target: F.cross_entropy(output.logits, target, reduction="none"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        metric=steep.accuracy,
        budget=steep.Budget(steps=STEPS),
        name=family,
    )


def text_losses(model, batch):
    inputs = {name: batch[name] for name in batch if name not in ("labels", "indices")}
    return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


FAMILIES = ("bert", "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_collators_batches_train_as_by_hand(family):
    recipe = text_recipe(family)
    expected = by_hand(recipe, text_losses)
    assert_equal_models(fit(recipe).model, expected, rtol=0, atol=0)
    assert_equal_models(fit(recipe, accumulate=4).model, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_svens_step_on_a_padded_batch_is_that_of_the_examples_alone(family):
    recipe = text_recipe(family)
    batch = next(iter(recipe.data(torch.Generator().manual_seed(1)).train))
    assert (batch["attention_mask"] == 0).any()
    torch.manual_seed(0)
    model = recipe.model().double()
    Sven(model, rtol=1e-3)(text_losses(model, batch))
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    rows, losses = [], []
    for i, length in enumerate(batch["attention_mask"].sum(1)):
        alone = {k: v[i : i + 1, :length] if v.ndim == 2 else v[i : i + 1] for k, v in batch.items()}
        used = [p for p in model.parameters() if p.grad is not None]
        loss = text_losses(model, alone)[0]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, used)]).numpy())
        losses.append(loss.item())
    u, s, vt = np.linalg.svd(np.array(rows), full_matrices=False)
    kept = s > 1e-3 * s[0]
    expected = vt[kept].T @ ((u.T @ np.array(losses))[kept] / s[kept])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-7 * abs(expected).max())


def test_a_method_for_classes_takes_the_logits_of_the_output():
    """PS-KD without weight on earlier predictions is the plain loss; with it, another from the second epoch on."""
    recipe = text_recipe("bert").replace(budget=steep.Budget(epochs=2))
    distilled = steep.method("ps-kd")
    assert_equal_models(fit(distilled(recipe, alpha_T=0.0)).model, fit(recipe).model, rtol=0, atol=1e-5)
    result = fit(distilled(recipe, alpha_T=0.9))
    assert not torch.allclose(result.model.classifier.weight, fit(recipe).model.classifier.weight, atol=1e-4)
    assert 0 <= result.test["accuracy"] <= 1
    bare = recipe.replace(model=lambda: Returning(recipe.model(), lambda output: (output.logits, None)))
    with pytest.raises(TypeError, match="the model returns a tuple of 2.*where scores of classes are needed"):
        fit(distilled(bare))


class Returning(nn.Module):
    def __init__(self, inner, function):
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, **inputs):
        return self.function(self.inner(**inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_messages_of_the_sms_spam_collection(family):
    recipe = text_recipe(family, sms())
    assert_equal_models(fit(recipe).model, by_hand(recipe, text_losses), rtol=0, atol=0)
    fitted = fit(recipe.replace(budget=steep.Budget(epochs=30)))
    assert fitted.history.losses[-1] < 0.2 * fitted.history.losses[0]


# sequences with their lengths --------------------------------------------------------------------------------------


class Tagged(Dataset):
    """Sequences of unlike length; the tag of a token is whether it is larger than the one before."""

    def __init__(self):
        rng = np.random.default_rng(1)
        self.tokens = [torch.from_numpy(rng.integers(1, 10, rng.integers(2, 8))) for _ in range(32)]

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        tokens = self.tokens[i]
        return tokens, torch.cat([torch.zeros(1), (tokens[1:] > tokens[:-1]).float()]).long()


def collate_tagged(examples):
    tokens, tags = zip(*examples, strict=True)
    lengths = torch.tensor([len(t) for t in tokens])
    return pad_sequence(tokens, True), lengths, pad_sequence(tags, True, padding_value=-100)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(10, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, tokens, lengths):
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])


def tagging_loss(output, tags):
    each = F.cross_entropy(output.transpose(1, 2), tags[:, : output.shape[1]], reduction="none", ignore_index=-100)
    return each.sum(1) / (tags >= 0).sum(1)


def tagger(**loader):
    def named(item):
        return steep.Batch(x={"tokens": item[0], "lengths": item[1]}, y=item[2])

    def data(generator):
        train = DataLoader(Tagged(), 8, shuffle=True, collate_fn=collate_tagged, **loader)
        return steep.Data(
            steep.adapt(train, named), steep.adapt(DataLoader(Tagged(), 16, collate_fn=collate_tagged), named)
        )

    return steep.Recipe(
        data=data,
        model=Tagger,
        loss=tagging_loss,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.03),
        budget=steep.Budget(steps=STEPS),
    )


@pytest.mark.filterwarnings("ignore:train and val share")
def test_sequences_with_lengths_train_as_by_hand():
    expected = by_hand(
        tagger(), lambda model, batch: tagging_loss(model(batch.x["tokens"], batch.x["lengths"]), batch.y)
    )
    assert_equal_models(fit(tagger()).model, expected, rtol=0, atol=0)
    assert_equal_models(fit(tagger(), accumulate=2).model, expected, rtol=1e-3, atol=1e-5)
    longer = fit(tagger().replace(budget=steep.Budget(epochs=60)))
    assert longer.val["loss"] < 0.3


@pytest.mark.filterwarnings("ignore:train and val share")
def test_worker_processes_of_a_loader_change_nothing():
    assert_equal_models(fit(tagger(num_workers=2)).model, fit(tagger()).model, rtol=0, atol=0)


# pictures with any number of boxes ---------------------------------------------------------------------------------


class Pictures(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        count = i % 3 + 1
        return torch.randn(1, 8, 8, generator=g), {
            "boxes": torch.rand(count, 4, generator=g),
            "labels": torch.arange(count),
        }


def collate_pictures(examples):
    images, targets = zip(*examples, strict=True)
    return torch.stack(images), list(targets)


def nearest_box(output, targets):
    """Squared distance of one predicted box to the nearest of each picture's."""
    return torch.stack(
        [(box - target["boxes"]).square().sum(1).min() for box, target in zip(output, targets, strict=True)]
    )


@pytest.mark.filterwarnings("ignore:train and val share")
def test_lists_of_targets_train_as_by_hand():
    recipe = steep.Recipe(
        data=lambda g: steep.Data(
            DataLoader(Pictures(), 4, shuffle=True, collate_fn=collate_pictures),
            DataLoader(Pictures(), 8, collate_fn=collate_pictures),
        ),
        model=lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4)),
        loss=nearest_box,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        budget=steep.Budget(steps=STEPS),
    )
    expected = by_hand(recipe, lambda model, batch: nearest_box(model(batch[0]), batch[1]))
    result = fit(recipe)
    assert_equal_models(result.model, expected, rtol=0, atol=0)
    assert result.examples == 4 * STEPS
    assert_equal_models(fit(recipe, accumulate=3).model, expected, rtol=1e-3, atol=1e-5)
    assert fit(steep.method("sven")(recipe)).val["loss"] > 0
