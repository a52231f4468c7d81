"""How many rows of logits the linear loss holds at once."""

# Fewer rows would read and write the weight's gradient more often than their products pay for; more would only take
# memory.
SMALLEST_CHUNK, LARGEST_CHUNK = 512, 4096


def chunk_rows(num_rows: int) -> int:
    """Return the rows whose logits are held at once: an eighth of all, within 512 and 4096.

    An eighth bounds the memory against that of whole logits. Each chunk of R rows reads and writes the weight's
    float32 gradient, 8 bytes for every 6 R floating-point operations per element: at 4096 rows less than a tenth of
    the time on a card of 300 operations per byte, at 512 rows on a CPU of 30.

    Args:
        num_rows: positions times sequences of a micro-batch.
    """
    return min(max(-(-num_rows // 8), SMALLEST_CHUNK), LARGEST_CHUNK)
