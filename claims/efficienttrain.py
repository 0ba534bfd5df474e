"""EfficientTrain: time saved and accuracy kept by low-frequency crops, on MNIST at its full 28 pixels."""

import steep
from steep.evidence.claims import Claim, Quantity, columns


def experiment(lab):
    recipe = steep.task("mnist10k", epochs=5)
    arms = {"EfficientTrain": [(steep.method("efficienttrain"), {"max_magnitude": 0.0})], "full size": []}

    def train(seed):
        found = {}
        for name, methods in arms.items():
            result = steep.fit(
                lab.shorter(steep.compose(recipe, methods)), seed=seed, evaluate_every=10**9, progress=False
            )
            found |= {f"{name}, CPU": result.cpu_seconds, f"{name}, accuracy": result.test["accuracy"]}
        return found

    seeds = list(range(6))
    rows = lab.each(seeds, train)
    return {
        "CPU seconds of training": columns(rows, seeds, "EfficientTrain, CPU", "full size, CPU"),
        "test accuracy": columns(rows, seeds, "EfficientTrain, accuracy", "full size, accuracy"),
    }


claim = Claim(
    id="efficienttrain",
    statement="Training visual networks costs 1.5 times less, without loss of accuracy.",
    source="abstract; ImageNet-1K (cost follows the curriculum: 1 / (0.6 (5/7)² + 0.2 (6/7)² + 0.2) = 1.53)",
    paper_scale="ResNet, ConvNeXt, DeiT, Swin and others on ImageNet, 300 epochs, 224 pixels",
    our_scale="A CNN of 25 thousand weights on 8000 images of MNIST, 5 epochs at 20, 20, 20, 24 and 28 pixels, 6 "
    "paired seeds, no augmentation and the same untuned settings in both arms",
    quantities=(
        Quantity("CPU seconds of training", better="lower", size=1.53),
        Quantity("test accuracy", better="higher", scale="difference", null=-0.003, size=0.0),
    ),
    experiment=experiment,
)
