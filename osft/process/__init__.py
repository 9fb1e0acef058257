"""A program as its caller sees it: what it prints, how it refuses, how it is asked to end, what it ends with."""
