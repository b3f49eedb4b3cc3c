"""Answers that must have a form: a JSON object, JSON of a schema, or a regular expression.

llguidance does the work (github.com/guidance-ai/llguidance): which tokens may come next, for any byte-level tokeniser.
It is imported when first needed, so that engine and workers that see no grammar do not pay for it.

    source.py     a request's grammar in the library's words, and the bounds on all of them
    check.py      for API workers: is it valid, and compiled soon enough? Neither torch nor tokeniser needed
    compiler.py   for the engine: compiled beside the steps, kept for the next request
    matcher.py    one answer's progress: which tokens may come next
"""
