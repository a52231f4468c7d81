"""Stand-ins and repairs for megatron-core, differences between its versions, and the libraries it computes with."""

from megatron_tst.megatron_patches.libraries import Libraries, find_libraries

__all__ = ["Libraries", "find_libraries"]
