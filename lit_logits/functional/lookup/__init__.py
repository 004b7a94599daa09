"""Decoding of packed residual codes by look-up tables; the one room that runs a compiler."""
