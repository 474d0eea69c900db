"""What the first minutes on a GPU should tell: `bash benchmarks/first_gpu/first_gpu.sh` (docs/first-gpu.md)."""
