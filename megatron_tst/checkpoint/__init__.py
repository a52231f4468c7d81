"""Save, load and retention of checkpoints; conversion to Hugging Face's format and back."""
