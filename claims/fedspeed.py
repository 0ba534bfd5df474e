"""FedSpeed against FedAvg on digits divided unevenly among clients, at equal rounds and at equal time."""

import steep
from steep.evidence.claims import Claim, Quantity, scores


def experiment(lab):
    recipe = steep.task("digits-federated", rounds=30)
    study = lab.compare(recipe, ["fedavg", "fedspeed"])
    return {
        "test accuracy at equal rounds": scores(study, "fedspeed", "accuracy", against="fedavg"),
        "test accuracy at equal time": scores(study, "fedspeed", "accuracy", against="fedavg", at_equal_time=True),
        "test loss at equal rounds": scores(study, "fedspeed", against="fedavg"),
    }


claim = Claim(
    id="fedspeed",
    statement="Converges in fewer rounds than FedAvg and generalises better, above all for long local runs.",
    source="abstract; tables of CIFAR-10 and CIFAR-100 with Dirichlet clients (a gain; its size varies)",
    paper_scale="ResNet-18 on CIFAR-10, CIFAR-100 and TinyImageNet, 100 and 500 clients, 1500 rounds",
    our_scale="MLP 64-32-10 on digits, 20 clients (Dirichlet 0.1), 5 a round, 30 rounds of 20 local steps, 8 paired "
    "seeds, all arms tuned",
    quantities=(
        Quantity("test accuracy at equal rounds", better="higher", scale="difference"),
        Quantity("test accuracy at equal time", better="higher", scale="difference"),
        Quantity("test loss at equal rounds", better="lower"),
    ),
    experiment=experiment,
)
