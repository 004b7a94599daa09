"""Train, validate, test or predict from a recipe: `python train.py fit --config configs/vq_logits.yaml`."""

from lit_logits.cli import main

if __name__ == "__main__":
    main()
