"""The pieces that an algorithm is put together from."""
