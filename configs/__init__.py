"""One commented YAML a recipe; `lit-logits fit --config vq_logits.yaml` finds them by name."""
