"""Six experts of one real text encoder, merged by the library's methods: `python -m benchmarks.text_family`."""
