"""Conversion to and from Hugging Face folders; each architecture has one table of names, used in both directions."""
