"""Conversion to and from Hugging Face folders: a table of names per architecture, read in both directions."""
