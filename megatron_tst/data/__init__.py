"""Text: from files to token ids, from documents to phases, from samples to batches.

Nothing is imported here, so that the worker processes of preprocessing start without megatron-core.
"""
