"""Methods that change the update: optimizers with torch's contract, used like those of `torch.optim`."""
