"""What megatron-core needs stood in or mended, what its versions differ in, and the libraries it computes with."""

from megatron_tst.megatron_patches.libraries import Libraries, find_libraries

__all__ = ["Libraries", "find_libraries"]
