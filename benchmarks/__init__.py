"""Measurements that anyone can rerun: `python -m benchmarks.train_step`."""
