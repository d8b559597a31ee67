"""What `python -m perf --all` does beside measuring steps: tests and sanitizer, the first step, a training step."""
