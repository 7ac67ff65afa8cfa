"""The demo: a small ScienceQA-like data set, its tokenizer and a tiny T5, all made here, with no download."""
