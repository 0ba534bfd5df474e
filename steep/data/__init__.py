"""Methods that change what the model sees, and when: curricula, selection, augmentation, batch size."""
