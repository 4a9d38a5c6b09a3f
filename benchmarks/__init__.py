"""Slow measurements, each a command of its own; nothing here runs in the tests."""
