"""Data: files become token ids, documents are split among phases, and samples become batches.

Nothing is imported here, so that the worker processes of preprocessing start without megatron-core.
"""
