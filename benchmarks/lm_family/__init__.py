"""`python -m benchmarks.lm_family`: fine-tune a language model on several books, merge, measure perplexity."""
