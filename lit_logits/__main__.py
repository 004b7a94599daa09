"""`python -m lit_logits` is the `lit-logits` command."""

from lit_logits.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
