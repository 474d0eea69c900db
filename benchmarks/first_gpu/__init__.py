"""Measure the first minutes on a GPU: `bash benchmarks/first_gpu/first_gpu.sh` (docs/first-gpu.md)."""
