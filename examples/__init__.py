"""Parts of a user's own, one file each: a head, a noise process, a solver, a family; and a data set made of files.

CONTRIBUTING.md describes the parts.
"""
