"""Things to run and read: each example is a small program that uses the library as anyone would."""
