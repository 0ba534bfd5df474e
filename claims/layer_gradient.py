"""Layer-wise gradients of slow and fast thinking: about language models of 1.5 billion parameters and more."""

from steep.evidence.claims import Claim, Quantity

claim = Claim(
    id="layer-gradient",
    statement="Answers without reasoning give larger gradients, strongest in the first layers, than detailed chains of "
    "thought; with these, gradients tell correct from irrelevant responses.",
    source="abstract and main results",
    paper_scale="Qwen2-1.5B to Llama-3.1-8B and their instruct versions, on nine data sets of questions",
    our_scale="none",
    quantities=(Quantity("nuclear norm of the projections' gradients", better="lower"),),
    experiment=None,
    reason="it is about pretrained language models that reason; networks small enough to be trained here do not",
)
