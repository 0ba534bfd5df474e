"""Methods that own an outer loop around local steps: federated rounds, bilevel problems, task streams."""
