"""Files: caches of logits, and folders and files that appear as a whole or not at all."""
