"""Methods that change the model: parametrizations, masks, custom backward passes, adapters."""
