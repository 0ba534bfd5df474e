"""The runs of a study: what defines a run, the store that keeps it, and the workers and machines that train it."""
