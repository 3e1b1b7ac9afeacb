"""Parts of a user's own, one file each: a head, a noise process, a solver, a family. CONTRIBUTING.md describes them."""
