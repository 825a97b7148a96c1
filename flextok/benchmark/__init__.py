"""Measurements that anyone can repeat: `python -m flextok.benchmark NAME`."""
