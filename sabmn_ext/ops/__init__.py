"""The operations: one file each, with schema, checks, dispatch and autograd. ``reference`` is the specification."""
