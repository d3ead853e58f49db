"""pvae and its peers, side by side in one run: `python -m benchmarks`. See README.md."""
