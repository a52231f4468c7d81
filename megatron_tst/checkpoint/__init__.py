"""Save, load and retention of checkpoints."""
