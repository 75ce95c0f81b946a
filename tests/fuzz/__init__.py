"""Fuzzers of everything that parses what a store holds: `python -m tests.fuzz --minutes 10`.

`targets` says what must hold of any bytes; `properties` (hypothesis) makes bytes that are nearly right; `coverage`
(atheris) makes those that reach new lines. corpus/ keeps small inputs, one folder per target, that the tests replay.
"""
