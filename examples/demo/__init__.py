"""`python -m examples.demo`: fine-tune real experts on real tasks, merge them with every method, compare."""
