"""Small-image classifiers of the distillation literature."""
