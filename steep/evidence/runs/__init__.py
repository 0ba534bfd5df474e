"""The runs of a study: what defines one, the store that keeps them, the workers and machines that make them."""
