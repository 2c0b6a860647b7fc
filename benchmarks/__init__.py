"""Benchmarks: each a small file, run as ``python -m benchmarks.bench_run --help`` and so on.

A figure alone says little about a program on an unknown machine, so each benchmark measures its own yardstick in the
same run (the disk without us, the memory bus, torch, mergekit where it is installed) and prints ratios. Nothing here
is a test with a time limit; ``--quick`` is a size that only shows that the benchmark works.

Data is generated, seeded, in the layout of real checkpoints, in a temporary folder that is removed afterwards. A cold
run drops the benchmark's own files from the page cache and no others.
"""
