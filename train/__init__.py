"""Training commands: data, augmentation, models, loop, checkpoints and reports."""
